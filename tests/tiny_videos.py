"""Tiny videos, written by PyAV for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

#: times of twelve frames at a rate that varies, in milliseconds
VARIABLE = (0, 80, 120, 250, 260, 420, 540, 580, 660, 751, 830, 870)
STEADY = tuple(range(0, 1200, 100))
SOUND_RATE = 16000


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that a conversion must keep.

    Attributes:
        times: of the frames, in seconds.
        end: of the last frame, in seconds.
        frames: uint8 [N, H, W, 3].
        sound: bytes of the packets of the sound.
        comment: the metadata of that name.
    """

    times: list[Fraction]
    end: Fraction
    frames: np.ndarray
    sound: list[bytes]
    comment: str


def bars(index: int, size: tuple[int, int]) -> np.ndarray:
    """The frame of an index: a red bar on the left that grows, on grey."""
    pixels = np.full((size[1], size[0], 3), 120, np.uint8)
    pixels[:, : 4 * (index + 1)] = (200, 30, 30)
    return pixels


def write_video(
    path: Path,
    times: Sequence[int] = VARIABLE,
    *,
    size: tuple[int, int] = (64, 64),
    sound: str | None = "aac",
    pixel_aspect: Fraction = Fraction(1),
    turn: int = 0,
    noise: bool = False,
) -> Path:
    """Write frames at times in milliseconds, a second of sound, and for ``turn`` degrees a display matrix (mp4)."""
    base, generator = Fraction(1, 1000), np.random.default_rng(0)
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        video: Any = container.add_stream("libx264", rate=12)
        video.width, video.height = size
        video.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        video.time_base = video.codec_context.time_base = base
        video.codec_context.sample_aspect_ratio = pixel_aspect
        audio: Any = container.add_stream(sound, rate=SOUND_RATE) if sound else None
        if audio is not None:
            audio.layout = "mono"
        for index, time in enumerate(times):
            pixels = generator.integers(0, 256, (*size[::-1], 3), np.uint8) if noise else bars(index, size)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, base
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            tone = (np.sin(np.arange(SOUND_RATE) / 8) * 8000).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            samples.sample_rate, samples.pts = SOUND_RATE, 0
            container.mux(audio.encode(samples))
            container.mux(audio.encode())
    if turn:
        _turn(path, turn)
    return path


def _turn(path: Path, degrees: int) -> None:
    """Write a rotation into the header of the first track, as a phone does (ISO/IEC 14496-12, section 8.3.2)."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags; times, ID, duration; layer, volume
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    values = (cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(data)


def read_video(path: Path) -> Contents:
    """Everything of a video."""
    with av.open(str(path)) as container:
        stream, base = container.streams.video[0], container.streams.video[0].time_base
        assert base is not None
        frames = list(container.decode(stream))
        metadata = {name.lower(): value for name, value in container.metadata.items()}
    with av.open(str(path)) as container:
        packets = container.demux(container.streams.audio) if container.streams.audio else ()
        sound = [bytes(packet) for packet in packets if packet.dts is not None]
    with av.open(str(path)) as container:
        ends = [packet.pts + (packet.duration or 0) for packet in container.demux(video=0) if packet.pts is not None]
    times = [frame.pts * base for frame in frames if frame.pts is not None]
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    hours, minutes, seconds = written.split(":") if (written := stream.metadata.get("DURATION")) else (0, 0, 0)
    end = max(max(ends) * base, int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds))  # Matroska's tag
    return Contents(times, end, pixels, sound, metadata.get("comment", ""))
