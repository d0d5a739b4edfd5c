"""Frames of video files, cameras and streams, read by PyAV."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from PIL import Image

from ..errors import RequestError, one_line

USUAL_RATE = Fraction(25)  # frames per second, where a source does not say
#: formats whose headers say how long the video is; of others FFmpeg estimates it
WITH_DURATION = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv", "asf")
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
BETWEEN_FRAMES = 0.002  # seconds
CLOSING_SECONDS = 2.0  # for a read in another thread to end


def check_pyav() -> None:
    """Check that PyAV, which an extra installs, is there.

    Raises:
        RequestError: it is missing.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise RequestError("videos need PyAV: pip install -e '.[video]' in hypersd's clone") from error


@dataclasses.dataclass(frozen=True)
class VideoFrame:
    """A decoded frame and its time, in units of the source's ``time_base``."""

    time: int
    decoded: Any
    pixel_aspect: Fraction

    def image(self) -> Image.Image:
        """The frame upright, as RGB with square pixels."""
        image = Image.fromarray(self.decoded.to_ndarray(format="rgb24"))
        if self.pixel_aspect != 1:
            image = image.resize((max(1, round(image.width * self.pixel_aspect)), image.height))
        turn = TURNS.get(self.decoded.rotation % 360)  # counterclockwise, as Pillow's
        return image if turn is None else image.transpose(turn)


class VideoSource:
    """The video of a file, a camera or a stream; close it, or use it as a context.

    Args:
        place: a file, an address that FFmpeg reads, or with ``format`` a device.
        format: FFmpeg's name of an input format, such as ``v4l2``; None finds it out.
        options: those of FFmpeg for the format, such as ``{"video_size": "640x480"}``.

    Attributes:
        time_base: unit of the frames' times, in seconds.
        rate: frames per second, on average.
        count: number of frames, if it is known; an estimate in some formats.
        damaged: packets so far that could not be decoded.
        problem: why reading ended before the end of the source; None otherwise.
        end: the time at which the last frame that was read ends.
        last_duration: of that frame, in the same units.

    Raises:
        RequestError: it cannot be opened, or has no video.
    """

    def __init__(self, place: str, format: str | None = None, options: Mapping[str, str] | None = None) -> None:
        import av
        from av.error import FFmpegError

        self.place = place
        av.logging.set_level(av.logging.FATAL)  # FFmpeg's lines about the rest come as exceptions, too
        try:
            self._container: Any = av.open(place, format=format, options=dict(options or {}))
        except FileNotFoundError as error:
            raise RequestError(f"{place} is not there: expected a video file, an address or a device") from error
        except (FFmpegError, OSError) as error:
            words = f"{place} cannot be read as a video ({error.strerror or one_line(error)})"
            raise RequestError(f"{words}: expected a file, an address or a device that FFmpeg reads") from error
        except ValueError as error:  # an unknown format
            raise RequestError(f"{place}: {one_line(error)}: expected one that `ffmpeg -formats` lists") from error
        if not self._container.streams.video:
            self._container.close()
            raise RequestError(f"{place} has no video: expected a file or an address with one")
        stream = self._stream = self._container.streams.video[0]
        self.time_base: Fraction = stream.time_base
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or USUAL_RATE)
        self._expected_end = self._find_end()
        self.count: int | None = stream.frames or self._estimated_count()
        self.damaged, self.end, self.last_duration = 0, 0, 0
        self.problem: str | None = None
        self._last_time: int | None = None
        self._packets_end = 0
        self._lock, self._is_closed = threading.Lock(), False

    @property
    def audio_codecs(self) -> list[str]:
        return [stream.codec_context.name for stream in self._container.streams.audio]

    def frames(self) -> Iterator[VideoFrame]:
        """All frames in order; times always rise. What cannot be decoded is left out and counted."""
        from av.error import FFmpegError

        packets = self._container.demux(self._stream)
        while True:
            try:
                with self._lock:
                    if self._is_closed or (packet := next(packets, None)) is None:
                        break
                    decoded = self._decoded(packet)
            except BlockingIOError:  # cameras of macOS, between two frames; it has ended the iterator as well
                time.sleep(BETWEEN_FRAMES)
                packets = self._container.demux(self._stream)
                continue
            except FFmpegError as error:
                self.problem = one_line(error)
                break
            yield from map(self._timed, decoded)
        if self.problem is None and self._expected_end is not None:
            missing = (self._expected_end - self._packets_end) * self.time_base
            if missing > Fraction(1, 2) / self.rate:
                self.problem = f"its last {float(missing):.2f} s are missing"

    def close(self) -> None:
        """Close it; if another thread waits for a frame that does not come, leave it to that thread."""
        self._is_closed = True
        if self._lock.acquire(timeout=CLOSING_SECONDS):
            self._container.close()
            self._lock.release()

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decoded(self, packet: Any) -> Sequence[Any]:
        from av.error import FFmpegError

        if packet.pts is not None:
            self._packets_end = max(self._packets_end, packet.pts + (packet.duration or 0))
        try:
            if packet.is_corrupt:
                self.damaged += 1
                return ()
            return packet.decode()
        except FFmpegError:
            self.damaged += 1
            return ()

    def _timed(self, decoded: Any) -> VideoFrame:
        usual = max(1, round(1 / self.rate / self.time_base))
        time = self.end if decoded.pts is None else decoded.pts
        if self._last_time is not None and time <= self._last_time:
            time = self._last_time + 1
        self._last_time, self.last_duration = time, decoded.duration or usual
        self.end = time + self.last_duration
        aspect = self._stream.codec_context.sample_aspect_ratio or 1
        return VideoFrame(time, decoded, Fraction(aspect))

    def _find_end(self) -> int | None:
        """The time at which the video ends by its header."""
        stream = self._stream
        if self._container.format.name not in WITH_DURATION:
            return None
        if stream.duration:
            return (stream.start_time or 0) + stream.duration
        with contextlib.suppress(ValueError):  # "00:00:01.250000000", in Matroska: also a time, not a duration
            hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
            return round((int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)) / self.time_base)
        return None

    def _estimated_count(self) -> int | None:
        """From the duration, which FFmpeg may have estimated as well."""
        stream, whole = self._stream, self._container.duration  # in microseconds
        seconds = stream.duration * self.time_base if stream.duration else Fraction(whole or 0, 1_000_000)
        return max(1, round(seconds * self.rate)) if seconds else None
