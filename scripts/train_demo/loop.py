"""One training loop for all of the demonstration networks: seeded, resumable, with a moving average of the weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

WARM_UP = 100  # steps
SAVE_EVERY = 30.0  # seconds
REPORT_EVERY = 20  # steps
AVERAGE = 0.998


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The length and the learning rate of a training.

    Attributes:
        name: of the files that the training keeps in the work folder.
        steps: optimizer steps.
        learning_rate: the highest; it rises over the first steps and falls to zero along a cosine (Loshchilov and
            Hutter, https://arxiv.org/abs/1608.03983).
        seed: decides every batch, together with the number of the step: a resumed training repeats them.
    """

    name: str
    steps: int
    learning_rate: float
    seed: int


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half() -> torch.autocast:
    """Multiply in bfloat16, which CPUs with AMX and GPUs do several times faster."""
    return torch.autocast(device().type, torch.bfloat16)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator of these numbers alone."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)


def train(plan: Plan, model: nn.Module, loss: Callable[[torch.Generator], Tensor], work: Path) -> nn.Module:
    """Train ``model`` and give back the moving average of its weights, as a model of its own in eval mode.

    Args:
        plan: steps, learning rate, name, seed.
        model: the network to train; ``loss`` uses it.
        loss: the loss of a batch that the generator decides.
        work: folder for the state, from which a later call goes on, and for the losses.
    """
    model.to(device()).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=plan.learning_rate, betas=(0.9, 0.99), fused=True
    )
    state_file = work / f"{plan.name}.state.pt"
    step, losses = _resume(state_file, model, average, optimizer)
    saved = time.monotonic()
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _rate(step, plan.steps)
        value = loss(seeded(plan.seed, step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        _follow(average, model, min(AVERAGE, (1 + step) / (10 + step)))
        losses.append(value.item())
        if step % REPORT_EVERY == 0 or step == plan.steps:
            _report(work, plan, losses)
        if time.monotonic() - saved > SAVE_EVERY or step == plan.steps:
            _save(state_file, step, losses, model, average, optimizer)
            saved = time.monotonic()
    return average.eval()


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, share: float) -> None:
    ours, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - share)


def _resume(file: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list]:
    if not file.exists():
        return 0, []
    state = torch.load(file, map_location=device(), weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["losses"]


def _save(file: Path, step: int, losses: list, model: nn.Module, average: nn.Module, optimizer) -> None:
    state = {"step": step, "losses": losses, "model": model.state_dict(), "average": average.state_dict()}
    torch.save({**state, "optimizer": optimizer.state_dict()}, partial := file.with_suffix(".partial"))
    os.replace(partial, file)


def keep(model: nn.Module, file: Path) -> None:
    """Write a trained model's weights, whole or not at all."""
    torch.save(model.state_dict(), partial := file.with_suffix(".partial"))
    os.replace(partial, file)


def fill(model: nn.Module, file: Path) -> None:
    """Read what ``keep`` wrote, wherever that was trained."""
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def _report(work: Path, plan: Plan, losses: list[float]) -> None:
    """Tell whoever watches: how far it is, and the loss of late."""
    recent = losses[-100:]
    report = {"step": len(losses), "steps": plan.steps, "loss": sum(recent) / len(recent)}
    (partial := work / f"{plan.name}.progress.partial").write_text(json.dumps(report))
    os.replace(partial, work / f"{plan.name}.progress.json")
