"""A stand-in for a pipeline, whose image is its frame: for what happens around the networks."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from small_manifests import shapes, small_manifest

from hypersd.engines import Manifest
from hypersd.runtime.params import Params, decide
from hypersd.runtime.request import Request
from hypersd.runtime.strength import find_strength

SIZE = 64


class FramePipe:
    """Its image is the init image; ``begin`` is called with the params of each.

    Attributes:
        calls: those params.
    """

    device = torch.device("cpu")
    choice = None

    def __init__(self, begin: Callable[[Params], None] = lambda params: None) -> None:
        side = (SIZE, SIZE, SIZE)
        self.manifest = msgspec.convert(small_manifest(shapes((1, 1, 1), side, side)), Manifest)
        self.begin = begin
        self.calls: list[Params] = []

    def decide(self, params: Params) -> Request:
        """The real decisions, but for the one that needs an encoder, which the manifest lacks."""
        request = decide(self.manifest, dataclasses.replace(params, image=None, strength=None))
        return dataclasses.replace(request, strength=find_strength(params), starts_from="image")

    def generate(self, params: Params) -> Any:
        self.calls.append(params)
        self.begin(params)
        return SimpleNamespace(images=[params.image])


def stream_threads() -> list[str]:
    """The names of the threads that streams have started."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hypersd-")]
