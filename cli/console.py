"""Output of commands: results to stdout, progress and remarks to stderr; bars only on a terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import HyperSDError

if TYPE_CHECKING:
    from ..engines import Bundle
    from ..engines.load import Choice
    from ..runtime import Pipeline

PIPE_WIDTH = 200  # columns where there is no terminal, so that a table's row stays one line


class _Results(Console):
    """Ends the command when its reader, such as `head`, has closed the pipe; reports output that cannot be written."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().print(*args, **kwargs)
        except BrokenPipeError:
            raise SystemExit(0) from None
        except OSError as error:
            raise HyperSDError(f"the output cannot be written: {error.strerror or error}") from error

    def on_broken_pipe(self) -> None:
        """Rich calls this while it handles the error: let the error through."""
        raise


class _Remarks(Console):
    """Falls silent when nobody reads it: work of minutes must not end because of its progress lines."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().print(*args, **kwargs)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True


def out() -> Console:
    """The console of a command's results."""
    return _Results(width=_width(sys.stdout), highlight=False, emoji=False)


def err() -> Console:
    """The console of progress and remarks."""
    return _Remarks(stderr=True, width=_width(sys.stderr), highlight=False, emoji=False)


def _width(stream: TextIO | None) -> int | None:
    """None lets rich ask the terminal. There is no stream where the shell has closed it."""
    return None if stream is not None and stream.isatty() else PIPE_WIDTH


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show a spinner while the body runs."""
    console = err()
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def step_bar(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of ``total`` steps; the value is a function that advances it by one."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def frame_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show frames per second and the time left; the value is a function of the frames so far and of their number.

    What the first call finds done does not count for the speed.
    """
    console = err()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.fields[number]} frames, {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: list[TaskID] = []

        def show(frames: int, total: int | None) -> None:
            if not tasks:
                tasks.append(bar.add_task(name, completed=frames, total=total, number=total or "?", rate="starting"))
            bar.update(tasks[0], completed=frames)
            if speed := bar.tasks[0].speed:
                bar.update(tasks[0], rate=f"{speed:.2f} frames/s")

        yield show


class DownloadBar:
    """Shows one download at a time (:class:`hypersd.engines.progress.DownloadProgress`)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None

    def start(self, filename: str, total: int | None) -> None:
        self.finish()
        if not self._console.is_terminal:
            self._console.print(f"download {filename}" + (f" ({total / 1e6:,.1f} MB)" if total else ""), markup=False)
            return
        columns = (TextColumn("download {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(filename, total=total)
        self._bar.start()

    def advance(self, n: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, n)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class StageLines:
    """Shows the stages of long work: a spinner or a bar while one runs, a line with its seconds when it is done.

    It implements :class:`hypersd.engines.progress.Progress`.
    """

    def __init__(self) -> None:
        self._console = err()
        self.downloads = DownloadBar(self._console)
        self._display: Progress | None = None

    def start(self, stage: str) -> None:
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._show(columns, stage, None)

    def update(self, fraction: float, detail: str) -> None:
        if self._display is None:
            return
        task = self._display.tasks[0]
        if task.total is None:  # the stage reports its fraction: a bar replaces the spinner
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self._show(columns, task.description, 1.0)
        self._display.update(self._display.tasks[0].id, completed=fraction, detail=detail)

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        self.hide()
        if ok:
            self._console.print(f"{stage:<36} {seconds:7.1f} s  {note}".rstrip(), markup=False)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _show(self, columns: tuple[ProgressColumn, ...], stage: str, total: float | None) -> None:
        self.hide()
        self._display = Progress(*columns, console=self._console, transient=True)
        self._display.add_task(stage, total=total, detail="")
        self._display.start()

    def hide(self) -> None:
        """Remove the spinner or the bar."""
        if self._display is not None:
            self._display.stop()
            self._display = None


class StageNotes(StageLines):
    """Shows stages while they run and keeps their notes, for work that is reported in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        self.hide()
        if note:
            self.notes.append(note)


def load_pipeline(args: argparse.Namespace, bundle: Bundle, **options: Any) -> Pipeline:
    """Load a pipeline on the engines that a command's options name, and print which backend runs where."""
    began, progress = time.perf_counter(), StageNotes()
    from ..runtime import Pipeline

    progress.start(f"loading {args.bundle}")
    try:
        pipe = Pipeline.load(
            bundle,
            args.backend,
            args.device,
            args.target,
            progress,
            precision=args.precision,
            low_memory=args.low_memory,
            **options,
        )
    finally:
        progress.hide()
    say_loaded(pipe, time.perf_counter() - began, progress.notes, auto=args.backend == "auto")
    return pipe


def say_loaded(pipe: Pipeline, seconds: float, notes: list[str], auto: bool) -> None:
    """Print which backend runs on which device, which targets were passed over, and a backend that may be faster."""
    choice, console = pipe.choice, err()
    assert choice is not None  # every loaded pipeline has one
    if choice.passed_over and choice.target is None:
        reasons = _each_once(choice.passed_over)
        console.print(f"TensorRT engines passed over: {reasons}", markup=False, soft_wrap=True)
    one_graph = f", {pipe.one_graph}" if pipe.one_graph else ""
    line = f"{pipe.manifest.checkpoint} on {_where(pipe)} with {_backend(choice)}{one_graph}, loaded in {seconds:.2f} s"
    if compiled := [note for note in notes if note.startswith("compiled for this GPU")]:
        line += f"; kernels {compiled[0]}"
    if pipe.is_low_memory:
        line += "; components are loaded when they are needed"
    is_slow = choice.backend == "onnxruntime" and pipe.device.type == "cpu" and not pipe.one_graph
    if auto and is_slow:
        line += _faster_with_openvino(pipe.manifest.precision)
    console.print(line, markup=False, soft_wrap=True)


def _faster_with_openvino(precision: str) -> str:
    """A remark for who left the backend open: on a CPU, OpenVINO is several times faster than ONNX Runtime."""
    from ..engines.openvino.library import has_native_bf16, is_installed
    from ..engines.precision import PRECISIONS

    if not is_installed():
        is_half = PRECISIONS[precision].compute == "float16"
        return f"; OpenVINO runs {precision} bundles faster: pip install openvino" if is_half else ""
    return "; --backend openvino is faster here, in bfloat16" if has_native_bf16() else ""


def _each_once(reasons: Mapping[str, str]) -> str:
    """Reasons why targets cannot run: those of all targets, then those of some, with their names."""
    targets: dict[str, list[str]] = {}
    for name, text in reasons.items():
        for reason in text.split("; "):
            targets.setdefault(reason, []).append(name)
    of_all = [reason for reason, names in targets.items() if len(names) == len(reasons)]
    of_some = [f"{', '.join(names)}: {reason}" for reason, names in targets.items() if len(names) < len(reasons)]
    return "; ".join(of_all + of_some)


def _where(pipe: Pipeline) -> str:
    if pipe.device.type != "cuda":
        return str(pipe.device)
    import torch

    return f"{pipe.device} ({torch.cuda.get_device_name(pipe.device)})"


def _backend(choice: Choice) -> str:
    """The backend's title, with the version that built its engines, and the precision that it computes in."""
    from ..engines.precision import PRECISIONS
    from ..engines.tensorrt.api import TITLES

    precision = PRECISIONS[choice.manifest.precision]
    weights = f", UNet's linear layers in {precision.storage}" if precision.is_compact else ""
    if choice.precision is not None:
        from ..engines.openvino.library import openvino_version

        return f"OpenVINO {openvino_version()} in {choice.precision}{weights}"
    if choice.target is None:
        return f"ONNX Runtime in {precision.plain.name}{weights}"
    target = choice.manifest.engines[choice.target]
    return f"{TITLES[target.backend]} {target.version} in {precision.plain.name}{weights}"
