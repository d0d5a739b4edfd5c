"""A video repainted frame by frame, in segments that an interruption does not lose."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..engines.files import whole_file, write_whole
from ..errors import RequestError, disk_errors, shown
from ..runtime.metadata import image_metadata
from ..runtime.params import Params
from ..runtime.stream import Stream
from .newest import Newest
from .segments import Joint, SegmentWriter, format_of, join, rejected_audio
from .source import VideoFrame, VideoSource, check_pyav

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..runtime import Pipeline

SEGMENT_FRAMES = 64
SETTINGS_NAME = "settings.json"
OTHER_DISK = "choose another place; finished segments are kept, and the same command continues"
OnFrame = Callable[["Progress"], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoJob:
    """What to convert, and how.

    Attributes:
        source: a file, or an address or a device that PyAV opens.
        output: the video to write.
        params: of every frame; ``seed`` is a number.
        control: names of ControlNets that follow the frames.
        skip_similar: see :class:`..runtime.stream.Stream`.
        format: FFmpeg's input format, for a device.
        options: FFmpeg's options of the input.
        most_frames: the number of frames after which to stop.
        has_audio: copy the sound of a file.
        replace: overwrite the output, and segments of another run.
        segment_frames: length of a segment.
    """

    source: str
    output: Path
    params: Params
    control: tuple[str, ...] = ()
    skip_similar: float | None = None
    format: str | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    most_frames: int | None = None
    has_audio: bool = True
    replace: bool = False
    segment_frames: int = SEGMENT_FRAMES

    @property
    def is_live(self) -> bool:
        """Whether the source goes on by itself, as a camera does, and cannot be read again."""
        return self.format is not None or ("://" in self.source and not self.source.startswith("file:"))

    @property
    def segments_folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.segments")


@dataclasses.dataclass(kw_only=True)
class Progress:
    """How far a conversion is, and at its end what it did.

    Attributes:
        total: number of frames, estimated for some sources; None if nobody knows.
        found: frames of segments that an earlier run has finished.
        frames: frames so far, with those.
        repeated: frames of this run that were skipped as similar.
        seconds: time that this run took for its frames.
        dropped: frames of a live source that came too fast.
        damaged: packets that could not be decoded.
        problem: why the source ended early; None if it did not.
        interrupted: whether the user stopped a live source.
    """

    total: int | None
    found: int = 0
    frames: int = 0
    repeated: int = 0
    seconds: float = 0.0
    dropped: int = 0
    damaged: int = 0
    problem: str | None = None
    interrupted: bool = False


def check_places(job: VideoJob) -> None:
    """Reject an output that cannot be written or would overwrite something, before any work.

    Raises:
        RequestError: its name has no format, it is there, or it is the source.
    """
    check_pyav()
    format_of(job.output)
    if job.output.is_dir():
        raise RequestError(f"{job.output} is a folder: expected a file name")
    if job.output.exists():
        if os.path.exists(job.source) and os.path.samefile(job.output, job.source):
            raise RequestError(f"{job.output} is the source itself: choose another name")
        if not job.replace:
            raise RequestError(f"{job.output} is there: --replace overwrites it, or choose another name")


def convert_video(pipe: Pipeline, job: VideoJob, on_frame: OnFrame) -> Progress:
    """Generate an image for every frame, and write them as a video with the frames' times and the source's sound.

    Frames are encoded in segments in a folder beside the output. After an interruption the same job takes the finished
    ones; its images are those of a run without interruption. A live source cannot be continued: an interruption is its
    end, and the video is written.

    Args:
        pipe: generates the images.
        job: the job; no other process may work on its output.
        on_frame: called after every frame, and once before the first.

    Raises:
        RequestError: a value is out of range, or the source cannot be read.
        DiskFullError: no space is left; finished segments are kept.
        UserError: the output cannot be written for another reason.
        EngineError: an engine failed.
    """
    check_places(job)
    with VideoSource(job.source, job.format, job.options) as source:
        _check_audio(job, source)
        settings, folder = _settings(pipe, job), job.segments_folder
        conversion = _Conversion(pipe, job, source, on_frame)
        with disk_errors(folder, OTHER_DISK):
            _open_folder(folder, settings, job.replace)
            segments = conversion.write_segments(folder)
        progress = conversion.progress
        if not segments:
            shutil.rmtree(folder)
            reason = f" ({progress.problem})" if progress.problem else ""
            raise RequestError(f"{job.source} has no frames that can be decoded{reason}: expected a video")
        with disk_errors(job.output, OTHER_DISK), whole_file(job.output, is_locked=True) as partial:
            join(segments, partial, format_of(job.output), _joint(job, source, progress, settings))
        shutil.rmtree(folder)
        return progress


class _Conversion:
    """One run: from frames to segments."""

    def __init__(self, pipe: Pipeline, job: VideoJob, source: VideoSource, on_frame: OnFrame) -> None:
        self._pipe, self._job, self._source, self._on_frame = pipe, job, source, on_frame
        counts = [count for count in (source.count, job.most_frames) if count is not None]
        self.progress = Progress(total=min(counts) if counts else None)

    def write_segments(self, folder: Path) -> list[Path]:
        """Write the segments that are missing in ``folder``, and return all of them."""
        job, progress = self._job, self.progress
        newest = Newest(self._source.frames()) if job.is_live else None
        frames = itertools.islice(iter(newest or self._source.frames()), job.most_frames)
        paths: list[Path] = []
        while (path := _segment(folder, len(paths))).exists():
            progress.frames += sum(1 for _ in itertools.islice(frames, job.segment_frames))
            paths.append(path)
        progress.found = progress.frames
        self._on_frame(progress)
        began = time.perf_counter()
        with self._end_of_live_source():
            while not progress.interrupted and (first := next(frames, None)) is not None:
                path = _segment(folder, len(paths))
                segment = itertools.chain([first], itertools.islice(frames, job.segment_frames - 1))
                with whole_file(path, is_locked=True) as partial:
                    self._write_segment(partial, segment)
                paths.append(path)
        progress.seconds = time.perf_counter() - began
        progress.dropped = newest.dropped if newest else 0
        progress.damaged, progress.problem = self._source.damaged, self._source.problem
        return paths

    def _write_segment(self, path: Path, frames: Iterable[VideoFrame]) -> None:
        """Generate and encode the frames of a segment."""
        job, times = self._job, deque[int]()

        def images() -> Iterator[Image]:
            for frame in frames:
                times.append(frame.time)
                yield frame.image()

        words: dict[str, Any] = {"control": job.control, "skip_similar": job.skip_similar}
        with Stream(self._pipe, images(), job.params, **words) as stream:
            size = stream.request.width, stream.request.height
            with SegmentWriter(path, job.output, size, self._source) as writer, self._end_of_live_source():
                for image in stream:
                    writer.write(image, times.popleft())
                    self.progress.frames += 1
                    self._on_frame(self.progress)
        self.progress.repeated += stream.skipped

    @contextlib.contextmanager
    def _end_of_live_source(self) -> Iterator[None]:
        """Take an interruption for the end of a live source."""
        try:
            yield
        except KeyboardInterrupt:
            if not self._job.is_live:
                raise
            self.progress.interrupted = True


def _segment(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.nut"


def _check_audio(job: VideoJob, source: VideoSource) -> None:
    if not _has_audio(job, source):
        return
    if rejected := rejected_audio(source, job.output):
        raise RequestError(
            f"{job.output.suffix} does not take the sound of {job.source} ({', '.join(rejected)}): name the output "
            "*.mkv, or leave the sound out with --no-audio"
        )


def _has_audio(job: VideoJob, source: VideoSource) -> bool:
    return job.has_audio and not job.is_live and bool(source.audio_codecs)


def _settings(pipe: Pipeline, job: VideoJob) -> dict[str, Any]:
    """All that decides on the segments, as JSON has it."""
    with Stream(pipe, (), job.params, control=job.control, skip_similar=job.skip_similar) as stream:
        image = image_metadata(pipe.manifest, stream.request, stream.seed)
    file = os.stat(job.source) if not job.is_live else None  # a live source is never the same again
    settings = {
        "source": os.path.abspath(job.source) if file else job.source,
        "source_version": [file.st_size, file.st_mtime_ns] if file else time.time_ns(),
        **image,
        "bundle": hashlib.sha256(msgspec.json.encode(pipe.manifest)).hexdigest(),
        "resize_mode": job.params.resize_mode,
        "control": job.control,
        "skip_similar": job.skip_similar,
        "frames": job.most_frames,
        "segment_frames": job.segment_frames,
        "format": job.output.suffix.lower(),
    }
    return json.loads(json.dumps(settings))


def _open_folder(folder: Path, settings: Mapping[str, Any], replace: bool) -> None:
    """Make the folder of segments, or take the one of an interrupted run with the same settings.

    Raises:
        RequestError: it holds segments of other settings.
    """
    file = folder / SETTINGS_NAME
    if file.exists():
        found = json.loads(file.read_bytes())
        names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
        if not names:
            return
        if not replace:
            pair = f"{names[0]} {shown(found.get(names[0]))}, not {shown(settings.get(names[0]))}"
            raise RequestError(
                f"{folder} has frames of another run ({pair}): --replace drops them, or use its settings"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(settings, ensure_ascii=False).encode())


def _joint(job: VideoJob, source: VideoSource, progress: Progress, settings: Mapping[str, Any]) -> Joint:
    end = source.end * source.time_base
    is_cut = job.most_frames is not None or progress.problem is not None
    kept = {name: value for name, value in settings.items() if name not in ("source", "source_version")}
    return Joint(
        audio=job.source if _has_audio(job, source) else None,
        end=end if is_cut else None,
        last_duration=source.last_duration * source.time_base,
        comment=json.dumps(kept, ensure_ascii=False),
    )
