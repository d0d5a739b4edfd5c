"""Precisions of a bundle: what weights are stored in, what is computed in, and how exact the result must be.

A new precision is one entry of :data:`PRECISIONS`, and a graph pass in ``export/passes.py`` if its format needs one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PrecisionName = Literal["fp16", "fp32"]
STORAGE_BYTES = {"float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """A precision of a bundle's components.

    Attributes:
        name: as the command line and manifests say it.
        storage: type of the weights, by its name in a manifest.
        compute: type of the activations.
        tolerance: the largest error allowed, as a fraction of the reference's largest value, and the root mean square
            of the error allowed, as a fraction of the reference's.
        compute_capability: the least GPU that TensorRT runs it on; None if every GPU does.
        needs_calibration: whether activations must be measured before weights can be stored.
    """

    name: PrecisionName
    storage: Literal["float16", "float32"]
    compute: Literal["float16", "float32"]
    tolerance: tuple[float, float]
    compute_capability: str | None = None
    needs_calibration: bool = False

    @property
    def storage_bytes(self) -> int:
        """Bytes of a weight."""
        return STORAGE_BYTES[self.storage]

    @property
    def dtype(self) -> torch.dtype:
        """torch's type of the weights."""
        import torch

        return getattr(torch, self.storage)


# float16 has 11 bits: each sum of a deep network is off by up to 5e-4 of its size, in another order in each library.
# float32's second number is the cost of ONNX Runtime's GroupNormalization at 1024x1024, which adds up a group's four
# million values one by one (1.7e-4 from float64, torch 1e-7).
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision(name="fp16", storage="float16", compute="float16", tolerance=(2e-2, 5e-3)),
        Precision(name="fp32", storage="float32", compute="float32", tolerance=(1e-3, 3e-4)),
    )
}
