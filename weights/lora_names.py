"""Names of modules in LoRA files: every layout's spelling of a path, brought together.

Each layout writes the same paths with another prefix, with dots or underscores, in diffusers' or in the original Stable
Diffusion's words. Dots are made underscores here, so that one table of spellings reads them all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

# The end of a tensor's name, which says what part of a layer it is.
_PARTS = re.compile(
    r"(?P<stem>.+?)(?:"
    r"(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(?P<kohya>down|up|mid)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.[^.]+)?\.weight"
    r"|\.lora_(?P<dora>magnitude_vector)(?:\.[^.]+)*"
    r"|\.(?P<plain>alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)(?:\.default)?"
    r")"
)
_PEFT = {"A": "down", "B": "up"}

_UNET_PREFIXES = ("lora_unet_", "unet_", "diffusion_model_", "model_diffusion_model_", "lycoris_")
_BARE_PREFIXES = ("", "base_model_model_")  # of files for one component alone
_ENCODER_PREFIXES = {
    "text_encoder": ("lora_te_", "lora_te1_", "text_encoder_", "text_encoders_clip_l_transformer_"),
    "text_encoder_2": ("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_"),
}

_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_COVERED_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
_OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def published_layers(modules: Iterable[str]) -> list[str]:
    """The paths, of all of a UNet's linear layers and convolutions, that the published Hyper-SD LoRAs cover."""
    return [path for path in modules if path.startswith(_COVERED_BLOCKS)]


def split_key(key: str) -> tuple[str, str] | None:
    """A tensor's module, as the file names it, and its part of the layer (``down``, ``alpha``); None if unknown."""
    if (match := _PARTS.fullmatch(key)) is None:
        return None
    part = match["kohya"] or match["plain"] or _PEFT.get(match["peft"] or "", "magnitude")
    return match["stem"], part


def encoder_path(path: str) -> str:
    """A path in a text encoder as transformers 5 has it; older versions put ``text_model.`` before it."""
    return path.removeprefix("text_model.")


class ModuleNames:
    """Every spelling of the paths of a base's layers.

    Args:
        modules: paths of linear and convolution layers by component; the UNet's is ``unet``.
    """

    def __init__(self, modules: Mapping[str, Collection[str]]) -> None:
        self._found: dict[str, tuple[str, str]] = {}
        encoders = [component for component in modules if component != "unet"]
        for component, paths in modules.items():
            is_unet = component == "unet"
            spellings = dict(_unet_spellings(paths) if is_unet else _encoder_spellings(paths))
            prefixes = (_UNET_PREFIXES if is_unet else _ENCODER_PREFIXES[component]) + _BARE_PREFIXES
            if not is_unet and len(encoders) > 1:  # a bare name does not say which encoder's
                prefixes = prefixes[: -len(_BARE_PREFIXES)]
            prefixes += tuple(f"base_model_model_{prefix}" for prefix in prefixes if prefix.endswith("_"))
            for prefix in prefixes:
                self._found |= {prefix + _flat(name): (component, path) for name, path in spellings.items()}

    def find(self, name: str) -> tuple[str, str] | None:
        """Component and path of a module as a file names it; None if the base has no such layer."""
        return self._found.get(_flat(name))


def is_original(name: str) -> bool:
    """Whether a name is in the original Stable Diffusion's words for a UNet's blocks."""
    return any(mark in _flat(name) for mark in ("input_blocks_", "middle_block_", "output_blocks_"))


def _flat(name: str) -> str:
    return name.replace(".processor.", ".").replace(".", "_")


def _unet_spellings(paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """Diffusers' spelling of every path, the original one, and that of the old attention processors."""
    resnets = len({path.split(".")[3] for path in paths if path.startswith("down_blocks.0.resnets.")})
    attended = {path.split(".")[1] for path in paths if re.match(r"up_blocks\.\d+\.attentions\.", path)}
    for path in paths:
        for name in (path, original_path(path, resnets, attended)):
            if name is not None:
                yield name, path
                if name.endswith(".to_out.0"):
                    yield name.removesuffix(".0"), path


def original_path(path: str, resnets: int, attended: Collection[str]) -> str | None:
    """A UNet's path in the original Stable Diffusion's words.

    Args:
        path: in diffusers' words.
        resnets: in each block of the way down.
        attended: numbers of the blocks of the way up that have attention.
    """
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if path.startswith("mid_block."):
        _, kind, number, rest = path.split(".", 3)
        return f"middle_block.{_MIDDLE[f'{kind}.{number}']}.{_RESNET.get(rest, rest)}"
    if (match := _BLOCK.fullmatch(path)) is None:
        return None
    way, block, kind, number, rest = match.groups()
    inner = resnets if kind.endswith("samplers") else int(number)
    index = int(block) * (resnets + 1) + inner
    if way == "down":
        rest = "op" if kind == "downsamplers" else _RESNET.get(rest, rest)
        return f"input_blocks.{index + 1}.{int(kind == 'attentions')}.{rest}"
    position = {"resnets": 0, "attentions": 1}.get(kind, 2 if block in attended else 1)
    return f"output_blocks.{index}.{position}.{_RESNET.get(rest, rest)}"


def _encoder_spellings(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    for path in map(encoder_path, paths):
        for name in (path, f"text_model.{path}"):
            yield name, path
            layer, _, leaf = name.rpartition(".")
            if leaf in _OLD_PROJECTIONS:
                yield f"{layer}.{_OLD_PROJECTIONS[leaf]}", path
