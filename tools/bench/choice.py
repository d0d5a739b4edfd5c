"""Who takes part."""

from __future__ import annotations

from pathlib import Path

from ...engines import Bundle
from ...errors import RequestError
from .contenders import CONTENDERS, OURS, Contender, Context, find_contender
from .options import BenchOptions
from .process import check_python


def choose_contenders(bundle: Bundle, options: BenchOptions) -> tuple[list[Contender], list[str]]:
    """hypersd first, with which all are compared, and the others; and in one line each why some do not take part.

    If only some of hypersd's backends are named, the first of them takes its place.

    Raises:
        RequestError: one that was named is not known or cannot run here, or an interpreter does not run.
    """
    for name, python in options.pythons.items():
        find_contender(name)
        check_python(name, python)
    context = Context(bundle, options.device, Path())
    if options.contenders:
        return _named(context, options), []
    chosen, left_out = [], []
    for contender in CONTENDERS:
        reason = contender.why_not_here(context, contender.name in options.pythons) or contender.why_not_usual(context)
        if reason is None:
            chosen.append(contender)
        else:
            left_out.append(f"{contender.name} is left out: {reason}")
    return chosen, left_out


def _named(context: Context, options: BenchOptions) -> list[Contender]:
    ours = [name for name in options.contenders if name.startswith(OURS)]
    first = OURS if OURS in ours or not ours else ours[0]
    named = [find_contender(name) for name in dict.fromkeys([first, *options.contenders])]
    for contender in named:
        if reason := contender.why_not_here(context, contender.name in options.pythons):
            raise RequestError(f"contender {contender.name} cannot run here: {reason}")
    return named
