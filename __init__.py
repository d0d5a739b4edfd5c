"""hypersd: generate images with Hyper-SD in one to eight steps, from a bundle of ONNX components.

>>> from hypersd import Pipeline
>>> pipe = Pipeline.load("bundles/Hyper-SDXL-1step-lora")
>>> pipe("a photo of a cat", seed=0).images[0].save("cat.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["HyperSDError", "Pipeline", "__version__"]

if TYPE_CHECKING:
    from .errors import HyperSDError
    from .runtime import Pipeline


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that ``import hypersd`` costs nothing (PEP 562)."""
    if name == "Pipeline":
        from .runtime import Pipeline

        return Pipeline
    if name == "HyperSDError":
        from .errors import HyperSDError

        return HyperSDError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
