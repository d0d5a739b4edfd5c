"""A stand-in for the recording of CUDA graphs on machines without a GPU: the one thing of the package that tests mock.

It is as unforgiving as a recording where it can be: nothing is computed until the first replay, the inputs are read
again at every replay, outputs keep their place, and work that draws random numbers, takes data from the host or waits
for the device is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypersd.engines import Engine

REFUSED = ("lift_fresh", "rand", "normal", "uniform", "bernoulli", "_local_scalar_dense", "nonzero", "masked_select")


class RefuseWhatGraphsCannot(TorchDispatchMode):
    """Fails at the first operation that a CUDA graph cannot hold, or would hold only once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(REFUSED), f"a graph cannot hold {func}"
        return func(*args, **(kwargs or {}))


class StandInCapture:
    """``capture`` for a ``GraphedFunction``; counts, whole images apart from single networks."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.image_captures = 0
        self.image_replays = 0
        self.outputs: list[Mapping[str, Tensor]] = []

    def __call__(
        self, work: Callable[[], Mapping[str, Tensor]], memory: Any
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        with RefuseWhatGraphsCannot():
            outputs = {name: torch.full_like(tensor, 77) for name, tensor in work().items()}
        is_image = "output" in outputs
        self.captures += 1
        self.image_captures += is_image

        def replay() -> None:
            self.replays += 1
            self.image_replays += is_image
            for name, tensor in work().items():
                outputs[name].copy_(tensor)

        return replay, outputs


class Capturable:
    """An engine of the CPU that says that its runs can be recorded."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inputs, self.outputs, self.device = engine.inputs, engine.outputs, engine.device
        self.capturable = True

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.engine.run(feeds)
