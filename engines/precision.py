"""Precisions of a bundle: what weights are stored in, what is computed in, and how exact the result must be.

A new precision is one entry of :data:`PRECISIONS`, its name in :data:`PrecisionName`, a threshold of images in
``engines/compare.py``, and a graph pass in ``export/passes.py`` if its format needs one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PrecisionName = Literal["fp16", "fp32", "int8"]
COMPUTE_BYTES = {"float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """A precision of a bundle's components.

    Attributes:
        name: as the command line and manifests say it.
        storage: type of the weights, by its name in a manifest; of ``"int8"`` those of the UNet's linear layers.
        compute: type of the activations, and of the weights that are not stored in fewer bits.
        tolerance: the largest error allowed, as a fraction of the reference's largest value, and the root mean square
            of the error allowed, as a fraction of the reference's.
    """

    name: PrecisionName
    storage: Literal["float16", "float32", "int8"]
    compute: Literal["float16", "float32"]
    tolerance: tuple[float, float]

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation, and of a weight that is not stored in fewer bits."""
        return COMPUTE_BYTES[self.compute]

    @property
    def dtype(self) -> torch.dtype:
        """torch's type of the activations."""
        import torch

        return getattr(torch, self.compute)

    @property
    def is_compact(self) -> bool:
        """Whether the UNet's linear layers are stored in fewer bits than are computed in."""
        return self.storage != self.compute

    @property
    def plain(self) -> Precision:
        """The precision of the components whose weights are stored in the type that is computed in."""
        return next(each for each in PRECISIONS.values() if each.storage == self.compute)


# float16 has 11 bits: each sum of a deep network is off by up to 5e-4 of its size, in another order in each library.
# float32's second number is the cost of ONNX Runtime's GroupNormalization at 1024x1024, which adds up a group's four
# million values one by one (1.7e-4 from float64, torch 1e-7).
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision(name="fp16", storage="float16", compute="float16", tolerance=(2e-2, 5e-3)),
        Precision(name="fp32", storage="float32", compute="float32", tolerance=(1e-3, 3e-4)),
        Precision(name="int8", storage="int8", compute="float16", tolerance=(2e-2, 5e-3)),
    )
}
