"""TensorRT engines for every network of a bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ...errors import BundleError, DeviceError, DiskFullError, EngineError, RequestError, UserError
from ..bundle import Bundle, link_or_copy, sha256_file, write_manifest
from ..cache_folder import cache_folder
from ..lock import locked
from ..manifest import (
    ENGINES_FOLDER,
    HIGHEST_LEVEL,
    LOWEST_LEVEL,
    MANIFEST_NAME,
    Component,
    EngineTarget,
    FileRecord,
    ImageShapes,
    Manifest,
    Plan,
    TensorRTBackend,
)
from ..progress import BuildProgress, Silent, Stage
from .api import BACKENDS, TensorRTApi, load_api, pip_line
from .build_job import BuildJob, Built
from .build_process import run_build
from .machine import Machine, this_machine, why_not_backend
from .targets import describe, narrowed, onnx_hash, plan_key, target_name, this_platform
from .validate import validate_plan

PLAN_OVERHEAD = 16 << 20  # bytes of a plan besides its weights: kernels and their tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build.

    Attributes:
        compute_capabilities: GPUs such as ``"8.9"``, for RTX; none builds for all of them.
        shapes: the part of the bundle's shapes to build for; None for all of it.
        optimization_level: TensorRT's, 0 (quickest build) to 5 (fastest engine); None for its default.
        stripped: leave the weights out of the plans and take them from the ONNX files at every load.
        refittable: let the weights of a loaded plan be exchanged.
        timing_cache: file of kernel timings that builds on one GPU share (TensorRT only); None for one in the user's
            cache folder.
    """

    compute_capabilities: tuple[str, ...] = ()
    shapes: ImageShapes | None = None
    optimization_level: int | None = None
    stripped: bool = False
    refittable: bool = False
    timing_cache: Path | None = None


def build_engines(
    bundle: Bundle | str | Path,
    backend: str = "auto",
    options: BuildOptions | None = None,
    progress: BuildProgress | None = None,
) -> Bundle:
    """Build what is missing of one target: a plan for every network of the bundle.

    A build that was interrupted goes on with the network that it was at. Plans made from the same inputs, in this
    bundle or in one beside it, are linked and not built again.

    Args:
        bundle: the bundle or its folder.
        backend: ``"tensorrt-rtx"`` (needs no GPU), ``"tensorrt"`` (builds for this machine's GPU), or ``"auto"`` for
            what is installed.
        options: everything else.
        progress: told what happens.

    Returns:
        The bundle with its new target.

    Raises:
        RequestError: an option is out of range, or not one that the flavour has.
        DeviceError: TensorRT is not installed, or the build needs a GPU and there is none.
        EngineError: TensorRT could not build a network. The bundle holds what was built before.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    options, progress = options or BuildOptions(), progress or Silent()
    machine = this_machine()
    chosen = choose_backend(backend, machine)
    api = load_api(chosen)
    if backend == "auto":
        progress.note(f"engines: {api}, {_why_chosen(machine)}")
    check_options(api, options, machine)
    return _Build(bundle, api, options, machine, progress).run()


def choose_backend(backend: str, machine: Machine) -> TensorRTBackend:
    """The flavour to build with.

    Raises:
        RequestError: it is not known.
        DeviceError: ``"auto"``, and none is installed.
    """
    if backend in BACKENDS:
        return backend  # type: ignore[return-value]  # pyright narrows a tuple's members from 3.11 on only
    if backend != "auto":
        raise RequestError(f"backend {backend!r} is not known: expected auto, {' or '.join(BACKENDS)}")
    if machine.gpu is not None and why_not_backend("tensorrt", machine) is None:
        return "tensorrt"
    if "tensorrt-rtx" in machine.versions:
        return "tensorrt-rtx"
    if "tensorrt" in machine.versions:
        raise DeviceError(f"TensorRT needs a GPU to build ({machine.no_gpu}): {pip_line('tensorrt-rtx')} needs none")
    raise DeviceError(f"no TensorRT is installed: {pip_line('tensorrt-rtx')} (needs no GPU to build)")


def _why_chosen(machine: Machine) -> str:
    if machine.gpu is None:
        return f"which needs no GPU to build ({machine.no_gpu})"
    return f"as installed; this machine has a {machine.gpu.name}"


def check_options(api: TensorRTApi, options: BuildOptions, machine: Machine) -> None:
    """Refuse what the flavour has not got or this machine cannot do, before any time is spent.

    Raises:
        RequestError: an option is out of range.
        DeviceError: a GPU is needed.
    """
    level = options.optimization_level
    if level is not None and not LOWEST_LEVEL <= level <= HIGHEST_LEVEL:
        raise RequestError(f"optimization level {level} is out of range: expected {LOWEST_LEVEL} to {HIGHEST_LEVEL}")
    known = api.compute_capabilities
    for capability in options.compute_capabilities:
        if not known:
            raise RequestError(f"{api} builds for this machine's GPU only: leave the compute capability out")
        if capability not in known:
            raise RequestError(f"compute capability {capability!r} is not known to {api}: expected {', '.join(known)}")
    if api.is_rtx and options.timing_cache is not None:
        raise RequestError(f"{api} times no kernels when it builds: leave the timing cache out")
    if machine.gpu is not None:
        return
    if not api.is_rtx:
        raise DeviceError(f"{api} needs a GPU to build ({machine.no_gpu}): {pip_line('tensorrt-rtx')} needs none")
    if options.stripped or options.refittable:
        kind = "without weights" if options.stripped else "with exchangeable weights"
        raise DeviceError(f"plans {kind} need a GPU to build ({machine.no_gpu}): build on one, or build plain plans")


def make_target(manifest: Manifest, api: TensorRTApi, options: BuildOptions, machine: Machine) -> EngineTarget:
    """What a build with these options makes of a bundle, no plans in it yet (:func:`.targets.target_name` names it)."""
    capabilities = options.compute_capabilities
    if not api.is_rtx and machine.gpu is not None:
        capabilities = (machine.gpu.compute_capability,)
    return EngineTarget(
        backend=api.backend,
        version=api.version,
        compute_capabilities=tuple(sorted(set(capabilities), key=float)),
        platform=this_platform(api.backend),
        precision=manifest.precision,
        shapes=options.shapes or manifest.shapes,
        optimization_level=options.optimization_level,
        stripped=options.stripped,
        refittable=options.refittable,
        plans={},
    )


def remove_target(bundle: Bundle, name: str) -> Bundle:
    """Delete a target, plans and all: one of a TensorRT that is gone takes gigabytes.

    Raises:
        RequestError: the bundle has no target of this name.
    """
    with locked(bundle.root, lambda: None), _disk_errors(bundle.root):
        bundle = Bundle.load(bundle.root)
        engines = dict(bundle.manifest.engines)
        if (target := engines.pop(name, None)) is None:
            raise RequestError(f"{bundle.root} has no engines {name!r}, it has: {', '.join(engines) or 'none'}")
        gone = {plan.file for plan in target.plans.values()}
        files = {file: record for file, record in bundle.manifest.files.items() if file not in gone}
        manifest = msgspec.structs.replace(bundle.manifest, engines=engines, files=files)
        write_manifest(bundle.root, manifest)  # first: a target without plans is none, plans without a target are waste
        shutil.rmtree(bundle.root / ENGINES_FOLDER / name, ignore_errors=True)  # the manifest's names lead nowhere else
    return Bundle(bundle.root, manifest)


class _Build:
    """One run of the builder, its options checked."""

    def __init__(
        self, bundle: Bundle, api: TensorRTApi, options: BuildOptions, machine: Machine, progress: BuildProgress
    ) -> None:
        self.root = bundle.root
        self.api = api
        self.options = options
        self.progress = progress
        self.machine = machine
        narrowed(bundle.manifest, options.shapes or bundle.manifest.shapes)  # refuses what reaches outside

    def run(self) -> Bundle:
        waiting = f"waiting for another build in {self.root} to end"
        with locked(self.root, lambda: self.progress.note(waiting)), _disk_errors(self.root):
            bundle = Bundle.load(self.root)
            target = make_target(bundle.manifest, self.api, self.options, self.machine)
            name = target_name(target, bundle.manifest)
            components = narrowed(bundle.manifest, target.shapes).components
            keys = {
                component: plan_key(target, components[component], onnx_hash(bundle.manifest, component))
                for component in components
            }
            done = self._done(bundle, name, keys)
            missing = [component for component in components if component not in done]
            self._check_space(bundle, [bundle.manifest.components[component] for component in missing])
            target = msgspec.structs.replace(target, plans=done)
            if not missing:
                self.progress.note(f"engines for {describe(target)} are there already")
                if bundle.manifest.engines[name] != target:  # somebody changed what it says of itself
                    return _recorded(bundle, name, target, {})
            for component in missing:
                plan, record = self._make(bundle, name, component, components[component], target, keys[component])
                target = msgspec.structs.replace(target, plans={**target.plans, component: plan})
                bundle = _recorded(bundle, name, target, {plan.file: record})
        return bundle

    def _done(self, bundle: Bundle, name: str, keys: dict[str, str]) -> dict[str, Plan]:
        """The target's plans that are unaltered and were built as this build would build them."""
        if name not in bundle.manifest.engines:
            return {}
        with Stage(self.progress, "check the engines that are there"):
            return {
                component: plan
                for component, plan in bundle.manifest.engines[name].plans.items()
                if plan.key == keys[component] and bundle.is_whole(plan, hashes=True)
            }

    def _check_space(self, bundle: Bundle, missing: list[Component]) -> None:
        weights = [bundle.manifest.files[file].size for component in missing for file in component.files]
        needed = (0 if self.options.stripped else sum(weights)) + PLAN_OVERHEAD * len(missing)
        free = shutil.disk_usage(self.root).free
        if missing and free < needed:
            raise DiskFullError(
                f"the engines need about {needed / 1e6:,.0f} MB, {self.root} has {free / 1e6:,.0f} MB free: "
                "free some space or copy the bundle to a larger disk"
            )

    def _make(
        self, bundle: Bundle, name: str, component: str, specs: Component, target: EngineTarget, key: str
    ) -> tuple[Plan, FileRecord]:
        """A plan in its place, linked or built."""
        file = f"{ENGINES_FOLDER}/{name}/{component}.engine"
        bundle.path(file)  # refuses a folder that is elsewhere: those plans would not be found again
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if (found := find_plan(self.root, component, key)) is not None:
            with contextlib.suppress(EngineError, BundleError):  # not what it says it is: build our own
                return self._take(bundle, component, specs, target, *found, path)
        with _unfinished(path) as unfinished, Stage(self.progress, f"{component}: build engine") as stage:
            for onnx in specs.files:  # what was built from another file would be recorded as built from this one
                bundle.check_file(onnx, hashes=True)
            built = run_build(self._job(bundle, component, specs, target, unfinished), self.progress.update)
            error = self._validate(bundle, component, specs, target, unfinished)
            record = FileRecord(size=unfinished.stat().st_size, sha256=sha256_file(unfinished))
            stage.note = _summary(built, record, error)
        for note in built.notes:
            self.progress.note(note)
        plan = Plan(
            file=file,
            onnx=onnx_hash(bundle.manifest, component),
            key=key,
            seconds=round(stage.seconds, 2),
            host_memory=built.host_memory,
            weights_memory=built.weights_memory,
            activation_memory=built.activation_memory,
            decomposed_attention=built.decomposed_attention,
            error=error,
        )
        return plan, record

    def _take(
        self,
        bundle: Bundle,
        component: str,
        specs: Component,
        target: EngineTarget,
        other: Bundle,
        plan: Plan,
        path: Path,
    ) -> tuple[Plan, FileRecord]:
        """A plan of another target or bundle, linked to its place and checked as one that was built here."""
        with _unfinished(path) as unfinished:
            link_or_copy(other.path(plan.file), unfinished)
            error = self._validate(bundle, component, specs, target, unfinished)
        self.progress.note(f"{component}: engine taken from {other.root}, built from the same inputs")
        file = path.relative_to(self.root).as_posix()
        changes = {"file": file, "error": plan.error if error is None else error}
        return msgspec.structs.replace(plan, **changes), other.manifest.files[plan.file]

    def _validate(
        self, bundle: Bundle, component: str, specs: Component, target: EngineTarget, plan: Path
    ) -> float | None:
        if self.machine.gpu is not None:
            self.progress.update(1.0, "comparing with ONNX Runtime")
        return validate_plan(self.api, self.machine, bundle, component, specs, target, plan)

    def _job(self, bundle: Bundle, component: str, specs: Component, target: EngineTarget, plan: Path) -> BuildJob:
        options = self.options
        return BuildJob(
            backend=self.api.backend,
            component=component,
            onnx=str(bundle.path(specs.onnx)),
            plan=str(plan),
            inputs=specs.inputs,
            outputs=specs.outputs,
            compute_capabilities=target.compute_capabilities if self.api.is_rtx else (),
            optimization_level=options.optimization_level,
            stripped=options.stripped,
            refittable=options.refittable,
            timing_cache=None if self.api.is_rtx else str(options.timing_cache or self._default_timing_cache()),
        )

    def _default_timing_cache(self) -> Path:
        gpu = self.machine.gpu.name.replace(" ", "-").replace("/", "-") if self.machine.gpu else "none"
        return cache_folder() / f"{self.api.backend}-{self.api.version}-{gpu}.timing"


def find_plan(root: Path, component: str, key: str) -> tuple[Bundle, Plan] | None:
    """An unaltered plan of this key, in the bundle at ``root`` or in one beside it."""
    for manifest in [root / MANIFEST_NAME, *sorted(root.absolute().parent.glob(f"[!.]*/{MANIFEST_NAME}"))]:
        with contextlib.suppress(BundleError, OSError):
            bundle = Bundle.load(manifest.parent)
            for target in bundle.manifest.engines.values():
                plan = target.plans.get(component)
                if plan is not None and plan.key == key and bundle.is_whole(plan, hashes=True):
                    return bundle, plan
    return None


def _recorded(bundle: Bundle, name: str, target: EngineTarget, new: dict[str, FileRecord]) -> Bundle:
    """The bundle with this target in its manifest, and without its plans that are to be replaced."""
    engines = bundle.manifest.engines
    before = {plan.file for plan in engines[name].plans.values()} if name in engines else set()
    replaced = before - {plan.file for plan in target.plans.values()}
    files = {file: record for file, record in bundle.manifest.files.items() if file not in replaced}
    manifest = msgspec.structs.replace(bundle.manifest, engines={**engines, name: target}, files={**files, **new})
    write_manifest(bundle.root, manifest)
    return Bundle(bundle.root, manifest)


def _summary(built: Built, record: FileRecord, error: float | None) -> str:
    words = [f"{record.size / 1e6:,.1f} MB, {built.host_memory / 1e9:.1f} GB of memory"]
    if error is not None:
        words.append(f"error at most {error:.0e}")
    if count := len(built.decomposed_attention):
        words.append(f"{count} attention{'s' if count > 1 else ''} in plain kernels")
    return "; ".join(words)


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """What the system says of a bundle that cannot be written, as one line with what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"the disk of {root} is full: free some space or copy the bundle to a larger disk"
            ) from error
        raise UserError(
            f"{root} cannot be written ({error.strerror or error}): copy the bundle to where it can be"
        ) from error


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A hidden file that gets its name when all went well, and is deleted otherwise."""
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.unlink(missing_ok=True)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
