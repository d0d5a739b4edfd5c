"""Build a target: a TensorRT plan for every component of a bundle."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import msgspec

from ...errors import BundleError, DiskFullError, EngineError, RequestError, disk_errors
from ..bundle import Bundle, write_manifest
from ..external_data import check_external_data
from ..files import cache_folder, link_or_copy, lock_file, sha256_file, whole_file
from ..image_shapes import narrowed
from ..manifest import ENGINES_FOLDER, MANIFEST_NAME, FileRecord
from ..progress import Progress, Silent, Stage
from ..specs import Component, EngineTarget, Plan
from .api import TensorRTApi, load_api
from .build_options import BuildOptions, check_options, choose_backend, make_target, why_chosen
from .build_process import BuildJob, Built, run_build
from .machine import Machine, this_machine
from .targets import cost_of_ranges, describe, onnx_hash, plan_key, target_name
from .validate import validate_plan

COPY_HINT = "copy the bundle to a disk with room that you may write to"
PLAN_OVERHEAD = 16 << 20  # bytes of a plan besides its weights: kernels and their tables


def build_engines(
    bundle: Bundle | str | Path,
    backend: str = "auto",
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Build the missing plans of one target: one plan for every component of the bundle.

    An interrupted build resumes with the component where it stopped. Plans built from the same inputs, in this bundle
    or in one beside it, are linked and not built again.

    Args:
        bundle: the bundle or its folder.
        backend: ``"tensorrt-rtx"`` (needs no GPU), ``"tensorrt"`` (builds for this machine's GPU), or ``"auto"`` for
            the one that is installed.
        options: everything else.
        progress: receives stages and notes.

    Returns:
        The bundle with its new target.

    Raises:
        RequestError: an option is out of range, or not supported by the backend.
        DeviceError: TensorRT is not installed, or the build needs a GPU and there is none.
        EngineError: TensorRT could not build a component. The bundle keeps the plans that were built before.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    options, progress = options or BuildOptions(), progress or Silent()
    machine = this_machine()
    chosen = choose_backend(backend, machine)
    api = load_api(chosen)
    if backend == "auto":
        progress.note(f"engines: {api}, {why_chosen(machine)}")
    check_options(api, options, machine, bundle.manifest.precision)
    return _Build(bundle, api, options, machine, progress).run()


def remove_target(bundle: Bundle, name: str) -> Bundle:
    """Delete a target with its plans, which may be gigabytes for a TensorRT that is gone.

    Raises:
        RequestError: the bundle has no target of this name.
    """
    with lock_file(bundle.root, lambda: None), disk_errors(bundle.root, COPY_HINT):
        bundle = Bundle.load(bundle.root)
        engines = dict(bundle.manifest.engines)
        if (target := engines.pop(name, None)) is None:
            raise RequestError(f"{bundle.root} has no engines {name!r}, it has: {', '.join(engines) or 'none'}")
        gone = {plan.file for plan in target.plans.values()}
        files = {file: record for file, record in bundle.manifest.files.items() if file not in gone}
        manifest = msgspec.structs.replace(bundle.manifest, engines=engines, files=files)
        write_manifest(bundle.root, manifest)  # first: plans without a target are only waste
        shutil.rmtree(bundle.root / ENGINES_FOLDER / name, ignore_errors=True)  # the manifest's names lead nowhere else
    return Bundle(bundle.root, manifest)


class _Build:
    """One run of the builder with checked options."""

    def __init__(
        self, bundle: Bundle, api: TensorRTApi, options: BuildOptions, machine: Machine, progress: Progress
    ) -> None:
        self.root = bundle.root
        self.api = api
        self.options = options
        self.progress = progress
        self.machine = machine

    def run(self) -> Bundle:
        waiting = f"waiting for another build in {self.root} to end"
        with lock_file(self.root, lambda: self.progress.note(waiting)), disk_errors(self.root, COPY_HINT):
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
                if bundle.manifest.engines[name] != target:  # edited by hand
                    return _recorded(bundle, name, target, {})
            elif cost := cost_of_ranges(target):
                self.progress.note(cost)
            for component in missing:
                plan, record = self._make(bundle, name, component, components[component], target, keys[component])
                target = msgspec.structs.replace(target, plans={**target.plans, component: plan})
                bundle = _recorded(bundle, name, target, {plan.file: record})
        return bundle

    def _done(self, bundle: Bundle, name: str, keys: dict[str, str]) -> dict[str, Plan]:
        """The target's plans that are unaltered and have the keys of this build."""
        if name not in bundle.manifest.engines:
            return {}
        with Stage(self.progress, "check the engines that are there"):
            return {
                component: plan
                for component, plan in bundle.manifest.engines[name].plans.items()
                if plan.key == keys[component] and bundle.is_whole(plan, hashes=True)
            }

    def _check_space(self, bundle: Bundle, missing: list[Component]) -> None:
        weights = 0 if self.options.stripped else sum(map(bundle.manifest.component_bytes, missing))
        needed = weights + PLAN_OVERHEAD * len(missing)
        free = shutil.disk_usage(self.root).free
        if missing and free < needed:
            raise DiskFullError(
                f"the engines need about {needed / 1e6:,.0f} MB, {self.root} has {free / 1e6:,.0f} MB free: "
                "free some space or copy the bundle to a larger disk"
            )

    def _make(
        self, bundle: Bundle, name: str, component: str, specs: Component, target: EngineTarget, key: str
    ) -> tuple[Plan, FileRecord]:
        """Link or build a plan."""
        file = f"{ENGINES_FOLDER}/{name}/{component}.engine"
        bundle.path(file)  # rejects a folder elsewhere: its plans would not be found again
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if (found := find_plan(self.root, component, key)) is not None:
            with contextlib.suppress(EngineError, BundleError):  # altered: build a new one
                return self._take(bundle, component, specs, target, *found, path)
        build = Stage(self.progress, f"{component}: build engine")
        with whole_file(path, is_locked=True) as unfinished, build as stage:
            for onnx in specs.files:  # an altered file would be recorded as this one
                bundle.check_file(onnx, hashes=True)
            check_external_data(bundle.path(specs.onnx), specs)
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
        """Link a plan of another target or bundle, and check it like a new one."""
        with whole_file(path, is_locked=True) as unfinished:
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
    """The bundle with this target in its manifest, without the records of plans that it replaces."""
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
