"""A CUDA device as a whole: its name, one capture at a time, memory that is given back, words for too little of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import DeviceError, DeviceMemoryError, RequestError, one_line

# torch: "only one capture may be underway at a time in the process". A wait for the whole device, or memory that is
# freed there, may invalidate a capture of another thread. So this lock is also held while ONNX Runtime makes a session
# (it waits for the device), a late engine or a graph is released, and torch's cache is emptied. Two releases are not
# under it: that of a TensorRT context which the ninth set of shapes on a stream pushes out, because its engine's lock
# is held then, and captures take engines' locks after this one; and that of a pipeline, which happens wherever the last
# reference to it goes. If a capture is spoiled, a GraphWarning says so and that kind of call runs without a graph.
# For the same reason never wait for this lock with a lock held that a capture takes, as engines' are.
one_capture = threading.Lock()

REMEDY = "generate smaller images or fewer at a time, or free the device"
# Memory of the host that the device is to read, torch refuses with CUDA's error and not with its own. The others are
# ONNX Runtime's words: of its calls of CUDA and its libraries (cuda_call.cc), and of its arena (bfc_arena.cc).
_OUT_OF_MEMORY = re.compile(
    r"CUDA error: out of memory|CUDA failure 2: out of memory|_STATUS_ALLOC_FAILED"
    r"|Failed to allocate memory for requested buffer|Available memory of \d+ is smaller than requested bytes"
)


def find_device(device: str | torch.device) -> torch.device:
    """The CPU, or a CUDA device that this machine has and torch can use; ``"cuda"`` is the first.

    Raises:
        RequestError: torch knows no such name, or it is a device of another kind.
        DeviceError: torch finds no CUDA device, or fewer.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"device {device!r} is not known: expected auto, cpu, cuda or cuda:N") from error
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise RequestError(f"device {found.type!r}: images are generated on cpu or cuda here")
    if not torch.cuda.is_available():
        raise DeviceError("torch finds no CUDA device: check the driver, or use device='cpu'")
    index, count = found.index or 0, torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"no CUDA device {index}: this machine has {count}, counted from 0")
    return torch.device("cuda", index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is exhausted: torch's, ONNX Runtime's or this package's own."""
    return isinstance(error, torch.OutOfMemoryError | DeviceMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def out_of_memory(needed: str, device: torch.device) -> DeviceMemoryError:
    """The error of a full device, with the memory that was needed and the memory that is free."""
    return DeviceMemoryError(
        f"out of device memory: {needed}, {free_memory(device) / 1e9:.2f} GB are free on {device}: {REMEDY}"
    )


@contextmanager
def out_of_memory_in_words(doing: str) -> Iterator[None]:
    """Turn errors of exhausted memory into an error that says what was done, and a remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(f"out of device memory, {doing} ({one_line(error)}): {REMEDY}") from error


def free_memory(device: torch.device) -> int:
    """Free bytes on a CUDA device; 0 on other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def release_cached_memory(device: torch.device) -> None:
    """Give the memory back that torch keeps for later tensors; on other devices than CUDA do nothing.

    It keeps it for the stream that used it: if that stream's work is done for good, it serves nobody.
    """
    if device.type == "cuda":
        with one_capture:
            torch.cuda.empty_cache()
