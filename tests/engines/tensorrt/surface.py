"""A stand-in for a version of TensorRT, from a recording of its bindings (scripts/record_tensorrt_api.py).

The libraries of ``tensorrt`` cannot be installed everywhere; its bindings were asked what they offer. The stand-in has
exactly that: another attribute is an AttributeError, other arguments are a TypeError, an enum has the members and
values of its version. It computes nothing. What it does is what :class:`StandIn` says, it notes every call, and what
nobody has told it is a NotImplementedError.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

RECORDINGS = sorted((Path(__file__).parents[2] / "assets" / "tensorrt_api").glob("*.json"))
VERSIONS = {recording.stem: recording for recording in RECORDINGS}
RTX = [name for name in VERSIONS if name.startswith("tensorrt_rtx")]
PLAIN = [name for name in VERSIONS if name not in RTX]
PLAN = b"the plan"

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # by name: TensorRT's name of the type, and the shape


class StandIn:
    """A module in the shape of a recorded version.

    Attributes:
        module: what stands in for the imported module.
        calls: what was called, and which properties were set, with arguments: ``("Builder.create_network", (2,))``.
        behaviour: what ``"Class.method"`` does, or what the property is, given the object and the arguments. Tests
            change it. A method without one returns None or True, as its signature says.
        inputs, outputs, attentions: the network that every parser finds in every file.
    """

    def __init__(self, recording: Path) -> None:
        self.recorded = json.loads(recording.read_text(encoding="utf-8"))
        self.package: str = self.recorded["package"]
        self.calls: list[tuple[str, tuple]] = []
        self.inputs: Tensors = {}
        self.outputs: Tensors = {}
        self.attentions: list[Any] = []
        self.behaviour: dict[str, Callable[..., Any]] = behaviour(self)
        self.module = types.ModuleType(self.package)
        self.module.__dict__["__version__"] = self.recorded["version"]
        for name, members in self.recorded["enums"].items():
            setattr(self.module, name, enum(name, members))
        for name in sorted(self.recorded["classes"], key=lambda name: len(self.recorded["classes"][name]["bases"])):
            setattr(self.module, name, self._class(name, self.recorded["classes"][name]))

    def has(self, name: str) -> bool:
        """Whether the version has a class or enum, or ``"Class.attribute"``."""
        owner, _, attribute = name.partition(".")
        recorded = self.recorded["classes"].get(owner) or self.recorded["enums"].get(owner)
        if not attribute or recorded is None:
            return recorded is not None
        return attribute in recorded or any(attribute in recorded.get(kind, ()) for kind in ("methods", "properties"))

    def make(self, cls: str, **state: Any) -> Any:
        """An object of a class, with what its properties say; names with ``_`` are for ``behaviour``."""
        made = getattr(self.module, cls).__new__(getattr(self.module, cls))
        made._state = state
        assert all(name.startswith("_") or hasattr(type(made), name) for name in state)
        return made

    def attention(self, name: str, **state: Any) -> Any:
        """An attention of fp16, 2 heads of 64; ``state`` changes its properties."""
        tensor = self.make("ITensor", name="tensor", dtype=self.module.DataType.HALF, shape=(1, 2, 16, 64))
        state = {"mask": None, "causal": False, "norm_op": self.module.AttentionNormalizationOp.SOFTMAX, **state}
        return self.make("IAttention", name=name, _inputs=[tensor] * 3, **state)

    def called(self, name: str) -> list[tuple]:
        """The arguments of each call of ``"Class.method"``."""
        return [arguments for called, arguments in self.calls if called == name]

    def _class(self, name: str, recorded: dict[str, Any]) -> type:
        bases = tuple(getattr(self.module, base) for base in recorded["bases"] if hasattr(self.module, base))
        members: dict[str, Any] = {"__slots__": () if bases else ("_state",)}
        for nested, values in recorded.get("enums", {}).items():
            members[nested] = enum(nested, values)
        for attribute, access in recorded["properties"].items():
            members[attribute] = self._property(attribute, access)
        for attribute, signatures in recorded["methods"].items():
            members[attribute] = self._method(attribute, [Signature(line, self.module) for line in signatures])
        return type(name, bases, members)

    def _property(self, name: str, access: str) -> property:
        def get(owner: Any) -> Any:
            if name in owner._state:
                return owner._state[name]
            return self._behaviour_of(owner, name)(owner)

        def put(owner: Any, value: Any) -> None:
            self.calls.append((f"{type(owner).__name__}.{name}", (value,)))
            owner._state[name] = value

        return property(get, put if access == "rw" else None)

    def _method(self, name: str, signatures: list[Signature]) -> Callable[..., Any]:
        def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
            fitting = [signature for signature in signatures if signature.takes(args, kwargs)]
            if not fitting:
                raise TypeError(f"{type(owner).__name__}.{name} takes {signatures}, not {args} {kwargs}")
            arguments = (*args, *kwargs.values())
            if name == "__init__":
                owner._state = {"_arguments": arguments}
                return None
            self.calls.append((f"{type(owner).__name__}.{name}", arguments))
            if fitting[0].result in ("None", "bool"):
                default: Any = None if fitting[0].result == "None" else True
                return self._behaviour_of(owner, name, lambda *_: default)(owner, *arguments)
            return self._behaviour_of(owner, name)(owner, *arguments)

        return call

    def _behaviour_of(self, owner: Any, name: str, default: Callable[..., Any] | None = None) -> Callable[..., Any]:
        for cls in type(owner).__mro__:
            if found := self.behaviour.get(f"{cls.__name__}.{name}"):
                return found
        if default is None:
            raise NotImplementedError(f"nobody told the stand-in what {type(owner).__name__}.{name} is")
        return default


class Signature:
    """One line that pybind11 wrote, such as ``(memory: int, size: int = 0) -> None``."""

    def __init__(self, line: str, module: types.ModuleType) -> None:
        arguments, _, self.result = line.rpartition(" -> ")
        self.line = line
        self.module = module
        self.parameters: list[tuple[str, str, bool]] = []  # name, type, whether it may be left out
        for part in re.split(r", (?=\w+: )", arguments[1:-1]):
            if part:
                name, _, described = part.partition(": ")
                kind, equals, _ = described.partition(" = ")
                self.parameters.append((name, kind, bool(equals)))

    def __repr__(self) -> str:
        return self.line

    def takes(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        names = [name for name, _, _ in self.parameters]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or len(given) < len(args) + len(kwargs) or not given.keys() <= {*names}:
            return False
        return all(
            self._fits(given[name], kind) if name in given else optional for name, kind, optional in self.parameters
        )

    def _fits(self, value: Any, kind: str) -> bool:
        wanted = getattr(self.module, kind, None)
        if kind == "Dims":
            return isinstance(value, tuple | list)
        if isinstance(wanted, type):
            return isinstance(value, wanted)
        if kind in ("int", "typing.SupportsInt"):
            return hasattr(value, "__int__")
        if kind in ("str", "bool"):
            return isinstance(value, {"str": str, "bool": bool}[kind])
        if kind in ("buffer", "typing_extensions.Buffer"):
            return memoryview(value) is not None
        return True


class Member:
    """An enum's member as pybind11 makes them: a name, a value, an int of it."""

    def __init__(self, name: str, value: int) -> None:
        self.name = name
        self.value = value

    def __int__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Member) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self), self.value))

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


def enum(name: str, members: Mapping[str, int]) -> type:
    made = type(name, (Member,), {})
    named = {member: made(member, value) for member, value in members.items()}
    for member, value in named.items():
        setattr(made, member, value)
    made.__members__ = named  # type: ignore[attr-defined]
    return made


def behaviour(stand_in: StandIn) -> dict[str, Callable[..., Any]]:
    """The behaviour of all versions: a build makes ``PLAN``, a parser finds the stand-in's network."""

    def parse(parser: Any, *_: Any) -> bool:
        network = parser._state["_arguments"][0]
        for kind, tensors in (("_inputs", stand_in.inputs), ("_outputs", stand_in.outputs)):
            for name, (dtype, shape) in tensors.items():
                network._state[kind].append(tensor(name, getattr(stand_in.module.DataType, dtype), shape))
        network._state["_layers"] += list(layers())
        return True

    def layers() -> Iterator[Any]:
        yield stand_in.make("ILayer", name="plain", type=stand_in.module.LayerType.CONSTANT)
        for attention in stand_in.attentions:  # the bindings hand out the base class
            kind = stand_in.module.LayerType.ATTENTION_INPUT
            yield stand_in.make("ILayer", name=f"{attention.name}_input", type=kind, _attention=attention)

    def tensor(name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        return stand_in.make("ITensor", name=name, dtype=dtype, shape=tuple(shape), is_shape_tensor=False)

    def add_input(network: Any, name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        network._state["_inputs"].append(tensor(name, dtype, shape))
        return network._state["_inputs"][-1]

    def create_network(_: Any, flags: int = 0) -> Any:
        return stand_in.make("INetworkDefinition", _inputs=[], _outputs=[], _layers=[])

    def build_to_stream(_: Any, network: Any, config: Any, writer: Any) -> bool:
        half = len(PLAN) // 2
        return all(writer.write(piece) == len(piece) for piece in (PLAN[:half], PLAN[half:]))

    make = stand_in.make
    return {
        "Builder.create_network": create_network,
        "Builder.create_builder_config": lambda _: make("IBuilderConfig"),
        "Builder.create_optimization_profile": lambda _: make("IOptimizationProfile"),
        "Builder.build_serialized_network": lambda *_: PLAN,
        "Builder.build_serialized_network_to_stream": build_to_stream,
        "IBuilderConfig.add_optimization_profile": lambda *_: 0,
        "IBuilderConfig.create_timing_cache": lambda *_: make("ITimingCache"),
        "IBuilderConfig.get_timing_cache": lambda _: make("ITimingCache"),
        "ITimingCache.serialize": lambda _: b"timings",
        "INetworkDefinition.num_inputs": lambda network: len(network._state["_inputs"]),
        "INetworkDefinition.num_outputs": lambda network: len(network._state["_outputs"]),
        "INetworkDefinition.num_layers": lambda network: len(network._state["_layers"]),
        "INetworkDefinition.__len__": lambda network: len(network._state["_layers"]),
        "INetworkDefinition.__getitem__": lambda network, i: network._state["_layers"][i],
        "INetworkDefinition.get_input": lambda network, i: network._state["_inputs"][i],
        "INetworkDefinition.get_output": lambda network, i: network._state["_outputs"][i],
        "INetworkDefinition.get_layer": lambda network, i: network._state["_layers"][i],
        "INetworkDefinition.add_input": add_input,
        "INetworkDefinition.add_attention": lambda network, *inputs: stand_in.attention("added"),
        "ILayer.precision_is_set": lambda _: False,
        "IAttentionInputLayer.attention": lambda layer: layer._state["_attention"],
        "IAttention.get_input": lambda attention, i: attention._state["_inputs"][i],
        "IAttention.get_output": lambda attention, i: attention._state["_inputs"][i],
        "OnnxParser.parse_from_file": parse,
        "OnnxParser.parse": parse,
        "Refitter.get_missing_weights": lambda _: [],
        "Runtime.deserialize_cuda_engine": lambda *_: make("ICudaEngine", device_memory_size_v2=512),
        "Runtime.engine_header_size": lambda _: 4,
        "Runtime.get_engine_validity": lambda *_: (stand_in.module.EngineValidity.VALID, 0),
        "ICudaEngine.create_runtime_config": lambda _: make("IRuntimeConfig"),
        "ICudaEngine.create_execution_context": lambda *_: make("IExecutionContext"),
        "IRuntimeConfig.create_runtime_cache": lambda _: make("IRuntimeCache"),
        "IRuntimeCache.serialize": lambda _: b"kernels",
    }
