"""The memory that a bundle's components need: TensorRT's as it reported it, others' estimated from their files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from .manifest import Manifest
from .precision import COMPUTE_BYTES, PRECISIONS
from .specs import Component, EngineTarget
from .stages import stage_of


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a component needs while it is loaded.

    Attributes:
        weights: held as long as the component is loaded.
        activations: a run's intermediate results; 0 where no figure is known.
    """

    weights: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.activations


Needs = Mapping[str, Need]


def estimated_needs(manifest: Manifest, bytes_per_weight: int | None) -> dict[str, Need] | None:
    """The weights of every component, from the sizes of its files, which are little else.

    Args:
        manifest: the bundle's.
        bytes_per_weight: those that the backend holds at least; None for the bundle's own.

    Returns:
        By component; None if the backend widens a UNet of which only some weights are stored in 8 bits.
    """
    precision, needs = PRECISIONS[manifest.precision], {}
    for name, component in manifest.components.items():
        stored = _bytes_per_weight(component)
        held = bytes_per_weight or stored
        if name == "unet" and precision.is_compact:
            if held > stored:
                return None
            held = stored  # as in the file
        needs[name] = Need(manifest.component_bytes(component) * held // stored)
    return needs


def _bytes_per_weight(component: Component) -> int:
    """Those of a component's own type: a VAE may be float32 in a float16 bundle."""
    return COMPUTE_BYTES[next(iter(component.outputs.values())).dtype]


def target_needs(target: EngineTarget) -> dict[str, Need] | None:
    """The figures that TensorRT reported of each plan; None if it did not of all."""
    needs = {}
    for name, plan in target.plans.items():
        if plan.weights_memory is None or plan.activation_memory is None:
            return None
        needs[name] = Need(plan.weights_memory, plan.activation_memory)
    return needs


def need_of_all(needs: Needs) -> int:
    """Bytes with all components loaded: they run one after another, and share the memory of their activations."""
    return _sum(needs, lambda need: need.weights) + max((need.activations for need in needs.values()), default=0)


def need_of_largest_stage(needs: Needs) -> int:
    """Bytes with one stage loaded at a time (:mod:`.stages`), all ControlNets included."""
    stages = {stage_of(name) for name in needs}
    return max(
        _sum({name: need for name, need in needs.items() if stage_of(name) == stage}, lambda need: need.total)
        for stage in stages
    )


def _sum(needs: Needs, size: Callable[[Need], int]) -> int:
    return sum(map(size, needs.values()))
