"""A device is waited for, emptied and shared out in one place; and too little memory is an error in words."""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hypersd
from hypersd.engines.cuda.device import is_out_of_memory, one_capture, out_of_memory_in_words, release_cached_memory
from hypersd.errors import EngineError

PACKAGE = Path(hypersd.__file__).parent
OUTSIDE = {"tests", "scripts"}  # scripts measure in processes of their own
# Calls that spoil another thread's capture or pipeline, and the one file that may make them.
GUARDED = {
    "torch.cuda.synchronize": "tools/bench/timed_pipeline.py",  # measures diffusers, in a process of its own
    "torch.cuda.empty_cache": "engines/cuda/device.py",
    "torch.cuda.Stream": "engines/cuda/streams.py",
    "torch.cuda.graph": "engines/cuda/capture.py",
}


def calls() -> Iterator[tuple[str, str]]:
    """Each file of the package, and the dotted names that it calls."""
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE)
        if file.parts[0] in OUTSIDE or any(part.startswith(".") for part in file.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield str(file.as_posix()), ast.unparse(node.func)


def test_what_spoils_a_capture_is_called_in_the_cuda_room_alone() -> None:
    """There it is under the lock of captures; the package waits for a whole device nowhere."""
    assert {(name, file) for file, name in calls() if name in GUARDED} == set(GUARDED.items())


def test_memory_is_not_given_back_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's capture, which the device's lock stands for: it would not survive that. The GPU is a fake."""
    emptied = threading.Event()
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied.set)
    release_cached_memory(torch.device("cpu"))
    assert not emptied.is_set()
    with one_capture:
        thread = threading.Thread(target=release_cached_memory, args=(torch.device("cuda", 0),))
        thread.start()
        assert not emptied.wait(0.1)
    thread.join(60)
    assert emptied.is_set()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);"),
            True,
        ),
        (RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1073741824"), True),
        (RuntimeError("Available memory of 12 is smaller than requested bytes of 4096"), True),
        (RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape out of range"), False),
    ],
)
def test_exhausted_memory_is_told_from_other_errors(error: RuntimeError, expected: bool) -> None:
    """In the words of torch and of ONNX Runtime; other errors stay what they are."""
    assert is_out_of_memory(error) is expected
    with pytest.raises(EngineError if expected else RuntimeError) as caught, out_of_memory_in_words("decoding"):
        raise error
    if expected:
        assert str(caught.value).startswith("out of device memory, decoding (")
        assert "\n" not in str(caught.value)
        assert "generate smaller images" in str(caught.value)
