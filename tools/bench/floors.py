"""The least time that each stage could take, in every precision that contenders computed in."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from ...engines import Bundle
from ...engines.progress import BuildProgress, Stage
from ...errors import one_line
from ...runtime.request import Request
from .entrant import Entrant
from .report import MeasuredRates

if TYPE_CHECKING:
    from .floor import Rates

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Floors:
    """Measured rates of a device by precision, and seconds by number of steps, precision and stage."""

    device: str | None
    rates: dict[str, MeasuredRates]
    seconds: dict[int, dict[str, dict[str, float]]]
    notes: list[str]

    def at(self, steps: int) -> dict[str, dict[str, float]]:
        """Seconds by precision and stage; nothing where they could not be told."""
        return self.seconds.get(steps, {})

    def of(self, entrant: Entrant, steps: int) -> dict[str, float]:
        """Seconds by stage in the precision of a contender that runs on the device; nothing for others."""
        return self.at(steps).get(entrant.precision or "", {}) if entrant.device == self.device else {}


def measure_floors(
    bundle: Bundle, requests: Sequence[Request], entrants: Sequence[Entrant], progress: BuildProgress
) -> Floors:
    """Count the graphs' work and measure the machine's rates, in a process of its own while all contenders sleep."""
    precisions = sorted({entrant.precision for entrant in entrants if entrant.precision is not None})
    if not precisions:
        return Floors(None, {}, {}, [])
    device = next(entrant.device for entrant in entrants if entrant.device is not None)
    with Stage(progress, "floor"):
        try:
            rates = {precision: _rates(device.partition(" ")[0], DTYPES[precision]) for precision in precisions}
            seconds = {request.steps: _seconds(bundle, request, rates) for request in requests}
        except Exception as error:  # whatever it is: what was measured is not given up for it
            return Floors(None, {}, {}, [f"no floor: {one_line(error)}"])
    measured = {
        precision: MeasuredRates(flops_per_second=rate.flops_per_second, bytes_per_second=rate.bytes_per_second)
        for precision, rate in rates.items()
    }
    return Floors(device, measured, seconds, [])


def _rates(device: str, dtype: str) -> Rates:
    """The machine's, measured by a fresh process, whose memory and threads are gone afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, device, dtype).result()


def _measure(device: str, dtype: str) -> Rates:
    from .floor import machine_rates

    return machine_rates(device, dtype)


def _seconds(bundle: Bundle, request: Request, rates: Mapping[str, Rates]) -> dict[str, dict[str, float]]:
    """By precision and stage."""
    from .floor import image_floor

    steps, height, width = request.steps, request.height, request.width
    return {
        precision: dict(image_floor(bundle, steps, height, width, request.batch, rate))
        for precision, rate in rates.items()
    }
