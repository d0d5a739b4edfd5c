"""`hypersd video` with a real bundle: images of frames, an interruption, one-line errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_videos import STEADY, read_video, write_video

from hypersd import Pipeline
from hypersd.cli import main
from hypersd.export.repositories import DEMO_ROOT
from hypersd.runtime.control_images import canny
from hypersd.runtime.image_files import fit
from hypersd.video.segments import SegmentWriter
from hypersd.video.source import VideoSource

PROMPT = "a red circle on a blue background"
WORDS = ("--strength", "0.5", "--keep-steps")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames of an odd size, with sound."""
    return write_video(tmp_path_factory.mktemp("videos") / "in.mp4", size=(121, 97))


@pytest.fixture(scope="module")
def converted(source: Path, demo_canny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, repainted."""
    output = tmp_path_factory.mktemp("converted") / "out.mp4"
    assert main(["video", str(demo_canny_bundle), str(source), str(output), PROMPT, *WORDS]) == 0
    return output


def frames_of(source: Path) -> list[Image.Image]:
    with VideoSource(str(source)) as video:
        return [frame.image() for frame in video.frames()]


def error(pixels: np.ndarray, image: Image.Image) -> float:
    return float(np.abs(pixels.astype(int) - np.asarray(image)).mean())


def test_a_video_goes_in_and_a_video_comes_out(source: Path, converted: Path, demo_canny_bundle: Path) -> None:
    """Its frames are the images of single calls, but for the encoder's error; times and sound are the source's."""
    before, after = read_video(source), read_video(converted)
    assert after.times == before.times
    assert after.sound == before.sound
    pipe = Pipeline.load(demo_canny_bundle)
    for index, frame in enumerate(frames_of(source)):
        image = pipe(PROMPT, image=frame, strength=0.5, keep_steps=True, seed=0).images[0]
        assert error(after.frames[index], image) < 6 < error(after.frames[index], fit(frame, 96, 96))


def test_a_controlnet_follows_the_frames(source: Path, demo_canny_bundle: Path, tmp_path: Path) -> None:
    """Each frame's edges are its control image."""
    pipe, output = Pipeline.load(demo_canny_bundle), tmp_path / "out.mp4"
    (name,) = pipe.manifest.controlnets
    words = ("--control", name, "--control-scale", "0.7", "--strength", "1", "--frames", "2")
    assert main(["video", str(demo_canny_bundle), str(source), str(output), PROMPT, *words]) == 0
    frame = fit(frames_of(source)[1], 96, 96)
    controls = {"control_image": {name: canny(frame)}, "controlnet_conditioning_scale": 0.7}
    with_edges = pipe(PROMPT, image=frame, strength=1.0, seed=0, **controls).images[0]
    without = pipe(PROMPT, image=frame, strength=1.0, seed=0).images[0]
    made = read_video(output).frames
    assert len(made) == 2
    assert error(made[1], with_edges) < 6 < error(made[1], without)


def test_a_lora_styles_every_frame(source: Path, export_demo_slotted: Callable[[str], Path], tmp_path: Path) -> None:
    """The file acts through the bundle's slot, as in `hypersd generate`."""
    bundle, output = export_demo_slotted("Hyper-Demo15-1step-lora"), tmp_path / "out.mp4"
    file, pipe = DEMO_ROOT / "styles/background-Demo15.safetensors", Pipeline.load(bundle)
    words = ("--strength", "1", "--frames", "1", "--use-lora", str(file))
    assert main(["video", str(bundle), str(source), str(output), PROMPT, *words]) == 0
    pipe.load_lora_weights(file, "style")
    call = {"image": frames_of(source)[0], "strength": 1.0, "seed": 0}
    styled, plain = (pipe(PROMPT, **call, adapters=adapters).images[0] for adapters in ({"style": 1.0}, None))
    (frame,) = read_video(output).frames
    assert error(frame, styled) < 6 < error(frame, plain)


def test_a_killed_conversion_goes_on(demo_canny_bundle: Path, tmp_path: Path, capsys) -> None:
    """Finished segments are taken; the video is that of a run that was not killed."""
    source = write_video(tmp_path / "in.mp4", range(0, 16_000, 50), size=(32, 32), sound=None)
    output, whole = tmp_path / "out.mp4", tmp_path / "whole.mp4"

    def words(output: Path) -> list[str]:
        return ["video", str(demo_canny_bundle), str(source), str(output), PROMPT, *WORDS, "--skip-similar", "0.1"]

    process = subprocess.Popen([sys.executable, "-m", "hypersd.cli", *words(output)], stderr=subprocess.DEVNULL)
    first, end = tmp_path / "out.mp4.segments" / "000000.nut", time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended by itself"
    assert first.exists()
    assert not output.exists()
    assert main(words(output)) == 0
    assert "320 frames, " in (said := capsys.readouterr().out)
    assert " of them from an earlier run" in said
    assert main(words(whole)) == 0
    made, expected = read_video(output), read_video(whole)
    assert made.times == expected.times
    # The images are the same; x264 was seen to decide otherwise for one of 36 macroblocks, once in ten runs.
    assert np.abs(made.frames.astype(int) - expected.frames).mean(axis=(1, 2, 3)).max() < 0.5
    assert not first.parent.exists()


def test_an_interruption_says_how_to_go_on(
    source: Path, demo_canny_bundle: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SegmentWriter, "write", interrupted)
    output = tmp_path / "out.mp4"
    assert main(["video", str(demo_canny_bundle), str(source), str(output), PROMPT, *WORDS]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"hypersd: interrupted; finished segments are in {output}.segments: the same command continues"


def test_a_truncated_video_is_written_and_reported(demo_canny_bundle: Path, tmp_path: Path, capsys) -> None:
    source, output = write_video(tmp_path / "in.mp4", STEADY, noise=True), tmp_path / "out.mp4"
    source.write_bytes(source.read_bytes()[:-9000])
    assert main(["video", str(demo_canny_bundle), str(source), str(output), PROMPT, *WORDS]) == 2
    said = capsys.readouterr()
    count = len(read_video(output).times)
    assert 1 <= count < 12
    assert said.out.startswith(f"{output}  {count} frames, ")
    pattern = rf"error: {source} is not whole \(.*are missing\): {output} has what could be decoded"
    assert re.search(pattern, said.err.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strength", "0"), "strength 0"),
        (("--strength", "nan"), "strength nan"),
        (("--strength", "1.5"), "strength 1.5"),
        (("--strength", "0.1"), "strength 0.1 of 1 step leaves none"),
        (("--control", "depth"), "control 'depth': the bundle has no such ControlNet, it has "),
        (("--control-scale", "1"), "--control-scale is about a ControlNet: expected --control NAME with it"),
        (("--strength", "1", "--skip-similar", "2"), "skip_similar 2"),
        (("--size", "64x64"), "height 64 is outside this bundle's"),
        (("--seed", "-1"), "seed -1"),
        (("--frames", "0"), "'0': expected a whole number, 1 or more"),
        (("--input-option", "fast"), "'fast': expected NAME=VALUE"),
    ],
)
def test_wrong_words_are_one_line(
    words: tuple[str, ...],
    message: str,
    source: Path,
    demo_canny_bundle: Path,
    tmp_path: Path,
    fails: Callable[..., str],
) -> None:
    assert message in fails("video", demo_canny_bundle, source, tmp_path / "out.mp4", PROMPT, *words)
    assert list(tmp_path.glob("out*")) == []


def test_an_output_that_is_there_is_told_before_anything_is_loaded(source: Path, tmp_path: Path, fails) -> None:
    output = tmp_path / "out.mp4"
    output.touch()
    assert f"{output} is there: --replace overwrites it" in fails("video", "no-bundle", source, output, PROMPT)


def test_pyav_is_named_where_it_is_missing(source: Path, tmp_path: Path, fails, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    line = fails("video", "no-bundle", source, tmp_path / "out.mp4", PROMPT)
    assert line.endswith("videos need PyAV: pip install -e '.[video]' in hypersd's clone")
