"""One loader for the weights of every component.

A part's configuration gives an empty module, its files' headers give names and shapes, and both are compared before
any weight is read. Weights are then read one at a time, a LoRA is added in float32, and they are rounded once: memory
holds one copy of the module in its type and little besides.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..weights.key_lists import describe_keys
from ..weights.safetensors_file import is_finite
from ..weights.stored_weights import StoredWeights
from .layout import Part
from .libraries import explained, quiet
from .single_file import Plan, Planned, convert, prefix

# Surplus tensors that change nothing, by the module's class: numbers from 0 to 76, what CLIP's training or its image
# encoder needs, and what a VAE's training needs.
HARMLESS = {
    "CLIPTextModel": r"(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?)",
    "CLIPTextModelWithProjection": r"(.*\.)?(position_ids|logit_scale)",
    "AutoencoderKL": r"(first_stage_model\.)?(loss|model_ema)\..*",
}
# diffusers' first names for the layers of a VAE's attention, which SD1.5's published VAE has
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Fuser(Protocol):
    """Adds something, a LoRA, to the weights while they are loaded."""

    def fuse(self, name: str, weight: Tensor) -> Tensor:
        """The weight with everything added, in float32; the weight itself if there is nothing to add.

        Args:
            name: the parameter's path in the module (``mid_block.resnets.0.conv1.weight``).
            weight: its value, of any floating type.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PartWeights:
    """A part whose files fit its module, before any weight was read.

    Attributes:
        part: configuration and files.
        module: its parameters are on the meta device, its buffers have their values.
        stored: the files.
        plan: the module's parameters by name, in the order of the files.
        beginning: of the part's key names, where the files may hold other parts.
    """

    part: Part
    module: nn.Module
    stored: StoredWeights
    plan: Plan
    beginning: str

    def has_stored(self, module: str) -> bool:
        """Whether the files hold weights of a direct child of the module, loaded or not."""
        return any(name.startswith(f"{self.beginning}{module}.") for name in self.stored.names)

    def load(self, dtype: torch.dtype, fuser: Fuser | None = None) -> nn.Module:
        """The module with its weights, in evaluation mode.

        Args:
            dtype: type of the weights.
            fuser: adds to the weights before they are rounded.

        Raises:
            WeightsError: a weight is not finite, or too large for the type.
        """
        for name, planned in self.plan.items():
            stored = self.stored.read(planned.source)
            weight = stored
            for step in planned.steps:
                weight = step(weight)
            if fuser is not None:
                weight = fuser.fuse(name, weight)
            value = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
            if not is_finite(value):
                self._explain_infinity(name, planned, weight, dtype)
            module, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
        return self.module.eval().requires_grad_(False)

    def _explain_infinity(self, name: str, planned: Planned, weight: Tensor, dtype: torch.dtype) -> None:
        """Raise the error of a weight that is NaN or infinite in the module."""
        path = self.stored.path(planned.source)
        if not is_finite(self.stored.read(planned.source)):
            raise WeightsError(f"{path}: {planned.source} holds NaN or an infinity: download the file again")
        if not is_finite(weight):
            raise WeightsError(f"{path}: {name} is not finite with the LoRA added: take another LoRA, or a lower scale")
        largest = weight.float().abs().max().item()
        raise WeightsError(
            f"{path}: {planned.source} holds {largest:.6g}, more than {str(dtype).removeprefix('torch.')} can: "
            "take --precision fp32"
        )


def open_part(part: Part, cls: Any, unused: Collection[str] = ()) -> PartWeights:
    """Compare the headers of a part's files with its configuration, before any time is spent.

    Args:
        part: configuration and files.
        cls: the module's class, of diffusers or transformers.
        unused: direct children of the module that become None; their weights may be missing.

    Raises:
        WeightsError: the configuration is not one of that class; tensors are left over or missing, which are listed;
            one has another shape, or is quantized in a way that is not known.
    """
    module = empty_module(part, cls)
    for name in unused:
        if getattr(module, name, None) is not None:
            setattr(module, name, None)
    expected = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
    stored = StoredWeights([found.path for found in part.weights])
    beginning = _beginning(part, stored)
    plan = _plan(part, stored, beginning, expected, cls.__name__)
    not_loaded = {name for name in plan if name.partition(".")[0] in unused}
    spare = {plan.pop(name).source for name in not_loaded}
    _check_names(part, stored, plan, beginning, expected, spare, cls.__name__)
    for name, planned in plan.items():
        stored.check_dtype(planned.source)
        if tuple(planned.shape) != expected[name]:
            raise WeightsError(
                f"{stored.path(planned.source)}: {planned.source} has the shape {list(planned.shape)}, "
                f"{_title(part, cls.__name__)} has {list(expected[name])}: these weights are another model's"
            )
    return PartWeights(part, module, stored, plan, beginning)


def empty_module(part: Part, cls: Any) -> Any:
    """A module of a part's configuration; parameters on the meta device, buffers with the values that it computes.

    Raises:
        WeightsError: it is not a configuration of that class.
    """
    from accelerate import init_empty_weights

    with quiet(), explained(part.folder / "config.json", cls.__name__), init_empty_weights(include_buffers=False):
        if hasattr(cls, "from_config"):  # diffusers
            return cls.from_config(part.config)
        return cls(cls.config_class.from_dict(part.config))


def _beginning(part: Part, stored: StoredWeights) -> str:
    """The beginning of the part's key names, which tells them from others in one file."""
    if not part.single_file:
        return ""
    if (beginning := prefix(part.name, stored.names)) is None:
        remedy = "take one with --vae" if part.name == "vae" else "take another file"
        raise WeightsError(f"{part.weights[0].path} holds no {part.name.partition('/')[0]}: {remedy}")
    return beginning


def _plan(part: Part, stored: StoredWeights, beginning: str, expected: Mapping[str, Any], kind: str) -> Plan:
    """The module's tensors, each from a stored one, and surplus ones that only conversion gave a name."""
    plan = {name: Planned.stored(name, stored.shape(name)) for name in stored.names if name.startswith(beginning)}
    if part.single_file:
        with explained(part.weights[0].path, kind):
            plan = convert(part.name, beginning, plan, part.config)
    return {_renamed(name, expected): planned for name, planned in plan.items()}


def _renamed(name: str, expected: Mapping[str, Any]) -> str:
    """A stored name as this version of the library has it."""
    if name in expected:
        return name
    flat = name.removeprefix("text_model.")  # transformers 5.6 has no such level in a CLIPTextModel
    new = re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda found: OLD_ATTENTION[found[0]], name)
    return next((other for other in (flat, f"text_model.{name}", new) if other in expected), name)


def _check_names(
    part: Part,
    stored: StoredWeights,
    plan: Plan,
    beginning: str,
    expected: Mapping[str, Any],
    spare: set[str],
    kind: str,
) -> None:
    """Compare both ways, but for ``spare`` names; what remains in the plan is exactly what the module expects."""
    harmless = re.compile(HARMLESS.get(kind, "(?!)"))
    used = spare | {planned.source for name, planned in plan.items() if name in expected}
    for name in plan.keys() - expected.keys():
        del plan[name]
    surplus = {n for n in stored.names if n.startswith(beginning) and n not in used and not harmless.fullmatch(n)}
    if surplus or plan.keys() != expected.keys():
        present = surplus | plan.keys()
        described = describe_keys(present, set(expected))
        raise WeightsError(f"{part.weights[0].path} does not fit {_title(part, kind)}: {described}")


def _title(part: Part, kind: str) -> str:
    """The module with the place of its configuration, which may be another than the weights'."""
    return f"the {kind} of {part.folder / 'config.json'}"
