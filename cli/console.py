"""What commands print with: results to stdout, progress and remarks to stderr; bars on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ..errors import HyperSDError

PIPE_WIDTH = 200  # columns where there is no terminal, so that a table's row stays one line


class _Results(Console):
    """Ends the command when its reader, such as `head`, has seen enough, and says so when it cannot be written."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().print(*args, **kwargs)
        except BrokenPipeError:
            raise SystemExit(0) from None
        except OSError as error:
            raise HyperSDError(f"the output cannot be written: {error.strerror or error}") from error

    def on_broken_pipe(self) -> None:
        """Rich calls this while it handles the error, and would take it for a failure."""
        raise


class _Remarks(Console):
    """Falls silent when nobody reads it: work that takes minutes is not given up for its progress."""

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
    """Shows that something of unknown length is going on."""
    console = err()
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def step_bar(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of ``total`` steps; what is given advances it by one."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)


class DownloadBar:
    """Shows one download at a time (:class:`hypersd.export.hub.DownloadProgress`)."""

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
    """Shows long work's stages: a spinner or a bar while one runs, a line with its seconds when it is done.

    It is what :class:`hypersd.export.progress.ExportProgress` and :class:`hypersd.engines.progress.BuildProgress` ask
    for.
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
        if task.total is None:  # the stage tells how far it is: a bar instead of the spinner
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
        """Take the spinner or the bar away."""
        if self._display is not None:
            self._display.stop()
            self._display = None


class StageNotes(StageLines):
    """Shows stages while they run and keeps what they said at their ends, for work that is told of in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        self.hide()
        if note:
            self.notes.append(note)
