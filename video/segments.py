"""Segments of a video and the file that they are joined to, written by PyAV."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import heapq
import io
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import RequestError, UserError, one_line
from .source import VideoSource

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
#: encoders and their options: constant quality, and packets in the order of their frames, so that they can be joined
X264 = "libx264", {"crf": "18", "preset": "medium", "bf": "0"}
VP9 = "libvpx-vp9", {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0"}
SEGMENT_FORMAT = "nut"  # keeps times exactly, in every unit


def format_of(output: Path) -> str:
    """FFmpeg's name of the container that a file name asks for.

    Raises:
        RequestError: it is none that is written here.
    """
    if (found := FORMATS.get(output.suffix.lower())) is None:
        raise RequestError(f"{output}: expected a name that ends in {', '.join(FORMATS)}")
    return found


class SegmentWriter:
    """Encodes images as a part of a video; a context that finishes the file.

    Args:
        path: the file.
        output: the whole video, whose name decides on the encoder.
        size: of the images, in pixels.
        source: has the unit of the times, and the rate.
    """

    def __init__(self, path: Path, output: Path, size: tuple[int, int], source: VideoSource) -> None:
        import av

        codec, options = VP9 if format_of(output) == "webm" else X264
        self._time_base = source.time_base
        with in_words(path):
            self._container: Any = av.open(str(path), "w", format=SEGMENT_FORMAT)
            stream = self._stream = self._container.add_stream(codec, rate=source.rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        stream.time_base = context.time_base = source.time_base
        context.colorspace, context.color_range = 1, 1  # BT.709, as of every player; limited range
        context.color_primaries, context.color_trc = 1, 1
        self._path = path

    def write(self, image: Image.Image, time: int) -> None:
        """Add an image at a time, in units of the source's ``time_base``."""
        import av

        frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts, frame.time_base = time, self._time_base
        with in_words(self._path):
            self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with in_words(self._path), contextlib.closing(self._container):
            if kind is None:
                self._container.mux(self._stream.encode())


def rejected_audio(source: VideoSource, output: Path) -> list[str]:
    """The codecs of a source's sound that the output's container does not take."""
    import av

    with av.open(io.BytesIO(), "w", format=format_of(output)) as container:
        known = container.supported_codecs
    return [codec for codec in source.audio_codecs if codec not in known]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """How segments become a video.

    Attributes:
        audio: the file whose sound is copied; None for silence.
        end: seconds at which the sound is cut; None for all of it.
        last_duration: of the last frame, in seconds.
        comment: the settings, for the file's metadata.
    """

    audio: str | None
    end: Fraction | None
    last_duration: Fraction
    comment: str


def join(segments: Sequence[Path], path: Path, format: str, joint: Joint) -> None:
    """Join segments and copy the sound, without encoding anything again; ``path`` is the file to write."""
    import av

    with contextlib.ExitStack() as stack:
        sound: Any = stack.enter_context(av.open(joint.audio)) if joint.audio else None
        first: Any = stack.enter_context(av.open(str(segments[0])))
        with in_words(path), av.open(str(path), "w", format=format) as container:
            output: Any = container
            output.metadata["comment"] = joint.comment
            video = output.add_stream_from_template(first.streams.video[0])
            packets = [_video_packets(segments, video, joint.last_duration)]
            if sound is not None:
                copies = {s.index: output.add_stream_from_template(s) for s in sound.streams.audio}
                packets.append(_audio_packets(sound, copies, joint.end))
            for packet in heapq.merge(*packets, key=lambda packet: packet.dts * packet.time_base):
                output.mux(packet)


def _video_packets(segments: Sequence[Path], stream: Any, last_duration: Fraction) -> Iterator[Any]:
    """The packets of all segments; each lasts until the next one."""
    import av

    last: Any = None
    for segment in segments:
        with av.open(str(segment)) as container:
            for packet in container.demux(video=0):
                if packet.dts is None:
                    continue  # the end
                if last is not None:
                    last.duration = round((packet.pts * packet.time_base - last.pts * last.time_base) / last.time_base)
                    yield last
                packet.stream, last = stream, packet
    if last is not None:
        last.duration = round(last_duration / last.time_base)
        yield last


def _audio_packets(container: Any, copies: Mapping[int, Any], end: Fraction | None) -> Iterator[Any]:
    from av.error import FFmpegError

    packets = container.demux(list(container.streams.audio))
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError:  # a truncated file, which its video has told
            return
        if packet is None:
            return
        if packet.dts is None or (end is not None and packet.dts * packet.time_base >= end):
            continue
        packet.stream = copies[packet.stream.index]
        yield packet


@contextlib.contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Turn PyAV's errors of writing a file into those of Python, and of a missing encoder into one line."""
    from av.error import FFmpegError

    try:
        yield
    except FFmpegError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        if isinstance(error, OSError):
            raise
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
