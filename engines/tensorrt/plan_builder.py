"""Build one TensorRT plan in this process, which should be a process of its own (:mod:`.build_process`).

Polygraphy makes the profiles and the configuration. It drives one TensorRT package per process, selected by an
environment variable that :mod:`.build_process` sets before Polygraphy is imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import BundleError, EngineError, one_line
from ..cores import available_cores
from ..files import write_whole
from ..image_shapes import extents_of
from ..progress import PhaseTree
from ..specs import TensorSpec, dim_range
from .api import DTYPE_NAMES, TensorRTApi, load_api
from .attention import attentions_without_kernel, mark_decomposable
from .build_process import BuildJob, Built
from .placeholders import MappedWeights, parse_mapped, replace_weights

SHOWN_ERRORS = 3
LONGEST_REASON = 400  # characters of TensorRT's own words in a message
MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")
NO_DRIVER = "cudaError 35"  # RTX looks for a GPU after every failure; a build requires none
NO_KERNEL = "Attention operation was not supported by a dedicated kernel"

Report = Callable[[float, str], bool]  # fraction and phase; False stops the build


class BuildCancelledError(Exception):
    """The build was stopped on request."""


def build_plan(job: BuildJob, report: Report) -> Built:
    """Build a plan and write it to ``job.plan``.

    Args:
        job: the plan's description.
        report: called with the progress; returns whether to continue.

    Raises:
        BuildCancelledError: ``report`` returned False.
        BundleError: the ONNX file is not the network that the job describes.
        EngineError: TensorRT cannot parse or build the network; the message has the reasons.
    """
    try:
        return _Build(load_api(job.backend), job, report).run()
    except BaseException:
        Path(job.plan).unlink(missing_ok=True)
        raise


class _Build:
    def __init__(self, api: TensorRTApi, job: BuildJob, report: Report) -> None:
        self.api = api
        self.job = job
        self.report = report
        self.errors: list[str] = []
        self.memory: dict[str, int] = {}
        self.notes: list[str] = []
        self.fraction = 0.0
        self.was_cancelled = False
        self.placeholders = MappedWeights(Path(job.onnx)) if job.stripped and api.is_rtx else None
        self.logger = api.make_logger(self._log)
        self.builder = api.trt.Builder(self.logger)
        self.builder.max_threads = available_cores()

    def run(self) -> Built:
        network = self._parse()
        decomposed: list[str] = []
        # First unchanged; then with plain layers for the attentions that have no kernel of their own; then for all,
        # because an attention may have a kernel alone and none among its neighbours.
        for choose in (None, self._without_kernel, self._all):
            if choose is not None:
                decomposed = mark_decomposable(self.api, network, choose(network))
            if self._build(network):
                break
            if self.was_cancelled:
                raise BuildCancelledError
            if choose == self._all or not any(NO_KERNEL in error for error in self.errors):
                raise self._failure()
        self.report(1.0, "done")
        return Built(
            host_memory=peak_memory(),
            weights_memory=self.memory.get("Weights"),
            activation_memory=self.memory.get("Activation"),
            decomposed_attention=tuple(decomposed),
            notes=tuple(self.notes),
        )

    def _without_kernel(self, network: Any) -> set[str]:
        return attentions_without_kernel(self.api, self.builder, network, self._configure_probe)

    def _all(self, network: Any) -> set[str]:
        return {attention.name for attention in self.api.attentions(network)}

    # the network

    def _parse(self) -> Any:
        network = self.api.create_network(self.builder)
        parser = self.api.trt.OnnxParser(network, self.logger)
        if self.placeholders is not None:
            parsed = parse_mapped(parser, Path(self.job.onnx), self.placeholders)
        else:
            parsed = self.api.parse(parser, Path(self.job.onnx))
        if not parsed:
            raise self._parser_failure(parser)
        _check_tensors(self.job, "input", [network.get_input(i) for i in range(network.num_inputs)], self.job.inputs)
        _check_tensors(
            self.job, "output", [network.get_output(i) for i in range(network.num_outputs)], self.job.outputs
        )
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            least, _, most = extents_of(self.job.inputs[tensor.name])
            if least == most:  # a fixed shape gives better kernels than a profile
                tensor.shape = least
        if self.placeholders is not None and not replace_weights(self.api, network, self.placeholders):
            raise EngineError(f"{self.job.component}: {self.job.onnx} has no weights to leave out: build it with them")
        return network

    def _parser_failure(self, parser: Any) -> EngineError:
        reasons = []
        for i in range(min(parser.num_errors, SHOWN_ERRORS)):
            error = parser.get_error(i)
            node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
            reasons.append(node + _shortened(error.desc()))
        why = "; ".join(reasons) or self._reasons()
        return EngineError(f"{self.job.component}: {self.api} cannot parse {self.job.onnx}: {why}")

    # the configuration

    def _configure(self, network: Any) -> Any:
        from polygraphy.backend.trt import CreateConfig, Profile
        from polygraphy.logger import G_LOGGER

        G_LOGGER.module_severity = G_LOGGER.CRITICAL  # TensorRT reports to our own logger
        profile = Profile()
        for name, spec in self.job.inputs.items():
            if any(not isinstance(dim, int) for dim in spec.shape):
                profile.add(name, *extents_of(spec))
        options: dict[str, Any] = {
            "profiles": [profile] if profile else [],
            "builder_optimization_level": self.job.optimization_level,
            "strip_plan": self.job.stripped,
            "profiling_verbosity": self.api.trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            "progress_monitor": self.monitor,
        }
        if self.api.is_rtx:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            config = CreateConfigRTX(**options)(self.builder, network)
            config.clear_flag(self.api.trt.BuilderFlag.TF32)  # as CreateConfig does: float32 means float32
            if self.placeholders is not None:
                config.set_flag(self.api.trt.BuilderFlag.REFIT_INDIVIDUAL)
            self._target(config)
        else:
            config = CreateConfig(**options)(self.builder, network)
            self._load_timing_cache(config)
        self.api.require_capturable(config)
        return config

    def _configure_probe(self) -> Any:
        """The configuration of a network that only tests for a kernel."""
        config = self.builder.create_builder_config()
        self._target(config)
        return config

    def _target(self, config: Any) -> None:
        if self.job.compute_capabilities:
            self.api.set_compute_capabilities(config, self.job.compute_capabilities)

    # the build

    def _build(self, network: Any) -> bool:
        self.errors.clear()
        tree = PhaseTree()
        self.monitor = self.api.make_progress_monitor(
            tree.start, lambda name, index: self._step(tree, name, index), tree.end
        )
        config = self._configure(network)
        built = self.api.build(self.builder, network, config, Path(self.job.plan))
        if built and self.job.timing_cache and not self.api.is_rtx:
            self._save_timing_cache(config, Path(self.job.timing_cache))
        return built

    def _load_timing_cache(self, config: Any) -> None:
        """Read kernel timings of earlier builds. Polygraphy would write a lock beside the file to do so."""
        if self.job.timing_cache and (path := Path(self.job.timing_cache)).is_file():
            cache = config.create_timing_cache(path.read_bytes())
            if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
                self.notes.append(f"the timing cache {path} is damaged, or not of this TensorRT and GPU: written anew")

    def _save_timing_cache(self, config: Any, path: Path) -> None:
        """Keep kernel timings for the next build; a failure is a note, since the plan itself is good."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, config.get_timing_cache().serialize())
        except OSError as error:
            self.notes.append(f"the timing cache {path} cannot be written: {error.strerror or error}")

    def _step(self, tree: PhaseTree, name: str, index: int) -> bool:
        tree.step(name, index)
        self.fraction = max(self.fraction, tree.fraction)  # a second try does not start again at 0
        self.was_cancelled = self.was_cancelled or not self.report(self.fraction, name)
        return not self.was_cancelled

    def _log(self, severity: str, text: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text)
        elif match := MEMORY.search(text):
            self.memory[match[1]] = int(match[2])

    def _failure(self) -> EngineError:
        """TensorRT's reasons, and the remedy if there is one."""
        reasons, hint = self._reasons(), ""
        if self.job.compute_capabilities:
            hint = (
                f"; it may build for no GPU in particular: leave out --compute-capability "
                f"{' '.join(self.job.compute_capabilities)}"
            )
        return EngineError(f"{self.job.component}: {self.api} could not build the engine: {reasons}{hint}")

    def _reasons(self) -> str:
        errors = [error for error in self.errors if NO_DRIVER not in error] or self.errors
        return "; ".join(map(_shortened, errors[:SHOWN_ERRORS])) or "it gave no reason"


def _check_tensors(job: BuildJob, kind: str, tensors: Sequence[Any], specs: dict[str, TensorSpec]) -> None:
    """Raise unless the network has the tensors that the manifest describes."""
    names = sorted(tensor.name for tensor in tensors)
    if names != sorted(specs):
        raise BundleError(f"{job.onnx} has the {kind}s {names}, the manifest says {sorted(specs)}; export it again")
    for tensor in tensors:
        spec = specs[tensor.name]
        dtype = DTYPE_NAMES.get(tensor.dtype.name, tensor.dtype.name)
        shape = tuple(tensor.shape)
        fits = len(shape) == len(spec.shape) and all(
            extent in (-1, dim_range(dim).opt) for extent, dim in zip(shape, spec.shape, strict=True)
        )
        if dtype != spec.dtype or not fits:
            raise BundleError(
                f"{job.onnx}: {kind} {tensor.name} is {dtype}{list(shape)}, the manifest says {spec}; export it again"
            )


def _shortened(text: str) -> str:
    line = one_line(Exception(text))
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes; 0 if the system does not report it.

    Not ``ru_maxrss``: on Linux it starts with the size of the process that this one was forked from.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    if sys.platform == "win32":
        return 0
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
