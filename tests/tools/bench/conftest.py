"""Stand-ins for contenders, for tests of the processes around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypersd.tools.bench.contender import Contender
from hypersd.tools.bench.contenders import OURS

STAND_IN = """
import os, sys, time
from hypersd.tools.bench.protocol import Facts, TimedImage

def prepare(diary, **_):
    if not diary:
        raise ValueError("no diary to prepare")
    with open(diary, "a") as file:
        print("prepared", os.getpid(), sep="|", file=file)

class Runner:
    def __init__(
        self, diary, name, kills_itself_at=None, raises_at=None, grey=0, hangs=False, holds=0, has_noise=False
    ):
        self.diary, self.name, self.grey, self.hangs, self.made = diary, name, grey, hangs, 0
        self.kills_itself_at, self.raises_at = kills_itself_at, raises_at
        self.holds, self.has_noise = holds, has_noise

    def load(self):
        held = bytearray(b"1" * self.holds)  # and lets it go before the first image
        print("a library says something on stdout")
        print('{"seconds": 0.0, "stages": {}}')
        os.write(1, b'{"error": "not by a library"}\\n')
        os.write(2, b"and on stderr\\n")
        del held
        return Facts(precision="fp32", device="cpu", how="stand-in", packages=("numpy", "no-such-package"))

    def generate(self, settings):
        with open(self.diary, "a") as diary:
            print(self.name, settings.seed, settings.prompt, settings.num_inference_steps, sep="|", file=diary)
        assert (settings.noise is not None) == self.has_noise
        self.made += 1
        if self.made == self.kills_itself_at:
            print("about to go")
            sys.stdout.flush()
            os.kill(os.getpid(), 9)
        if self.made == self.raises_at:
            raise ValueError("first line\\nsecond line")
        while self.hangs:
            time.sleep(0.05)
        print("generating")
        return TimedImage(self.pixels(), 0.25, {"tokens": 0.05, "step 1": 0.1})

    def pixels(self):
        if self.grey is None:  # where numpy is not
            return None
        import numpy
        return numpy.full((16, 16, 3), self.grey, numpy.uint8)
"""


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    """The file in which stand-ins note each image: NAME|SEED|PROMPT|STEPS."""
    return tmp_path / "diary"


@pytest.fixture
def stand_in(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Contender]:
    """``stand_in(name, **behaviour)``: a contender that only notes each image in the diary."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def make(name: str = OURS, **behaviour: Any) -> Contender:
        options = {"diary": str(diary), "name": name, **behaviour}
        return Contender(name=name, summary="a stand-in", module="stand_in", options=lambda _: options)

    return make


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``contenders(*these)``: the only ones in the registry."""

    def know(*these: Contender) -> None:
        monkeypatch.setattr("hypersd.tools.bench.contenders.CONTENDERS", these)

    return know
