"""CUDA streams of which no two owners in the process have the same."""

from __future__ import annotations

import gc
import threading
from weakref import WeakValueDictionary

import torch

from ...errors import EngineError

POOLED = 32  # streams that torch makes for a device and a priority (kStreamsPerPool of c10/cuda/CUDAStream.cpp)

_claimed: WeakValueDictionary[tuple[torch.device, int], torch.cuda.Stream] = WeakValueDictionary()
_lock = threading.Lock()


def claim_stream(device: torch.device | None = None) -> torch.cuda.Stream:
    """A stream that nobody else in this package has, as long as the returned object lives.

    ``torch.cuda.Stream()`` gives out the same 32 streams in turn (pytorch/pytorch#173729). Two pipelines that share one
    without sharing a lock would record each other's work in their graphs. A stream that a caller made with torch is not
    known here: it may be one of these.

    Args:
        device: a CUDA device; None for the current one.

    Raises:
        EngineError: all of the device's streams are claimed.
    """
    stream = _draw(device)
    if stream is None:
        gc.collect()  # a pipeline that is part of a cycle is gone only then
        stream = _draw(device)
    if stream is None:
        raise EngineError(
            f"all {POOLED} CUDA streams of {device or 'the current device'} are in use, and a loaded pipeline holds up "
            "to two: load fewer pipelines in one process, or drop those that are not needed"
        )
    return stream


def _draw(device: torch.device | None) -> torch.cuda.Stream | None:
    with _lock:
        for _ in range(2 * POOLED):  # others may draw streams meanwhile
            stream = torch.cuda.Stream(device)
            if (key := (stream.device, stream.cuda_stream)) not in _claimed:
                _claimed[key] = stream
                return stream
    return None
