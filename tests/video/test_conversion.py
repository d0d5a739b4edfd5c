"""Videos in, videos out: times, sound, interruptions, sources that are not whole.

The pipeline is a stand-in, whose image is its frame. tests/cli/test_video.py has a real one.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from frame_pipe import SIZE, FramePipe
from tiny_videos import STEADY, VARIABLE, Contents, read_video, write_video

from hypersd.errors import DiskFullError, RequestError, UserError
from hypersd.runtime.params import Params
from hypersd.video.conversion import Progress, VideoJob, convert_video
from hypersd.video.newest import Newest
from hypersd.video.source import VideoSource

MILLISECOND = Fraction(1, 1000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames at a rate that varies, with sound."""
    return write_video(tmp_path_factory.mktemp("videos") / "in.mp4")


def job(source: Path | str, output: Path, **changes: Any) -> VideoJob:
    return VideoJob(
        **{
            "source": str(source),
            "output": output,
            "params": Params(prompt="a cat", seed=0),
            "segment_frames": 5,
            **changes,
        }
    )


def convert(
    source: Path | str,
    output: Path,
    pipe: Any = None,
    on_frame: Callable[[Progress], None] = lambda _: None,
    **words: Any,
) -> Progress:
    return convert_video(pipe or FramePipe(), job(source, output, **words), on_frame)


def errors_of(made: Contents, expected: Contents) -> np.ndarray:
    """The mean error of each frame, of 255."""
    return np.abs(made.frames.astype(int) - expected.frames).mean(axis=(1, 2, 3))


# Times, frames and sound


@pytest.mark.parametrize(
    ("source_name", "output_name", "sound"),
    [
        ("in.mp4", "out.mp4", "aac"),
        ("in.mkv", "out.mov", "aac"),
        ("in.mkv", "out.webm", "libopus"),
        ("in.ts", "out.mkv", "mp2"),
    ],
)
def test_a_video_keeps_its_times_its_length_and_its_sound(
    source_name: str, output_name: str, sound: str, tmp_path: Path
) -> None:
    source, output = write_video(tmp_path / source_name, sound=sound), tmp_path / output_name
    progress = convert(source, output)
    before, after = read_video(source), read_video(output)
    assert len(after.times) == len(VARIABLE) == progress.frames
    assert max(abs(a - b) for a, b in zip(before.times, after.times, strict=True)) <= MILLISECOND
    assert abs(before.end - after.end) <= MILLISECOND
    assert after.sound == before.sound
    assert errors_of(after, before).max() < 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source_name, output_name])


def test_the_settings_are_in_the_video(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out.mp4", skip_similar=0.9)
    comment = read_video(tmp_path / "out.mp4").comment
    for words in ('"prompt": "a cat"', '"strength": 0.8', '"skip_similar": 0.9', '"seed": 0'):
        assert words in comment
    assert str(source.parent) not in comment, "folders are nobody's business"


def test_the_number_of_frames_can_be_limited(source: Path, tmp_path: Path) -> None:
    """The sound ends with them."""
    assert convert(source, tmp_path / "out.mp4", most_frames=7).frames == 7
    before, after = read_video(source), read_video(tmp_path / "out.mp4")
    assert after.times == before.times[:7]
    assert after.sound == before.sound[: len(after.sound)]
    assert 10 <= len(after.sound) <= 12, "of 17, 64 ms each, 1 of them before the beginning"


def test_the_sound_can_be_left_out(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out.webm", has_audio=False)
    assert read_video(tmp_path / "out.webm").sound == []


def test_odd_sizes_become_the_size_of_the_images(tmp_path: Path) -> None:
    convert(write_video(tmp_path / "in.mp4", STEADY, size=(71, 43)), tmp_path / "out.mp4")
    made = read_video(tmp_path / "out.mp4")
    assert made.frames.shape == (12, SIZE, SIZE, 3)
    assert made.times == [Fraction(time, 1000) for time in STEADY]


@pytest.mark.parametrize(("turn", "corner"), [(0, (0, 47)), (90, (0, 0)), (180, (63, 0)), (270, (47, 63))])
def test_frames_are_turned_as_the_source_says(turn: int, corner: tuple[int, int], tmp_path: Path) -> None:
    """The red bar's lower end is turned with it."""
    with VideoSource(str(write_video(tmp_path / "in.mp4", size=(64, 48), turn=turn))) as source:
        image = next(source.frames()).image()
    red, green, _ = image.getpixel(corner)  # type: ignore[misc]
    assert image.size == ((64, 48) if turn % 180 == 0 else (48, 64))
    assert red - green > 100


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "in.mkv", size=(48, 48), pixel_aspect=Fraction(4, 3))
    with VideoSource(str(path)) as source:
        assert next(source.frames()).image().size == (64, 48)


def test_similar_frames_are_repeated(tmp_path: Path) -> None:
    """Each segment begins with an image of its own: it does not matter where an interruption was."""
    pipe = FramePipe()
    progress = convert(write_video(tmp_path / "in.mp4"), tmp_path / "out.mp4", pipe, skip_similar=0.5)
    assert progress.frames == 12
    assert progress.repeated == 12 - len(pipe.calls) > 0
    assert len(read_video(tmp_path / "out.mp4").times) == 12


# Interruptions


class StopError(Exception):
    pass


def stop_after(frames: int, error: type[BaseException] = StopError) -> Callable[[Progress], None]:
    def on_frame(progress: Progress) -> None:
        if progress.frames == frames:
            raise error

    return on_frame


@pytest.mark.parametrize("frames", [3, 11, 12])
def test_an_interrupted_conversion_goes_on(frames: int, source: Path, tmp_path: Path) -> None:
    """No finished segment is generated again, and the video is that of a run without interruption."""
    words: dict[str, Any] = {"skip_similar": 0.9}
    convert(source, tmp_path / "whole.mp4", **words)
    output = tmp_path / "out.mp4"
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, None, stop_after(frames, KeyboardInterrupt), **words)
    assert not output.exists()
    found = convert(source, output, **words).found
    assert found == frames // 5 * 5
    made, expected = read_video(output), read_video(tmp_path / "whole.mp4")
    assert (made.times, made.end, made.sound, made.comment) == (
        expected.times,
        expected.end,
        expected.sound,
        expected.comment,
    )
    assert errors_of(made, expected).max() < 0.5, "of 255"
    assert not job(source, output).segments_folder.exists()


def test_a_killed_join_is_repeated_without_generating(source: Path, tmp_path: Path, monkeypatch) -> None:
    from hypersd.video import conversion

    output, pipe = tmp_path / "out.mp4", FramePipe()

    def killed(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "join", killed)
        with pytest.raises(StopError):
            convert(source, output)
    assert convert(source, output, pipe).found == 12
    assert pipe.calls == []
    assert len(read_video(output).times) == 12


def test_segments_of_other_settings_are_not_taken(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    with pytest.raises(StopError):
        convert(source, output, None, stop_after(7))
    other = Params(prompt="a dog", seed=0)
    with pytest.raises(RequestError, match=r"frames of another run .prompt 'a cat', not 'a dog'.: .*--replace"):
        convert(source, output, params=other)
    assert convert(source, output, params=other, replace=True).found == 0
    assert '"a dog"' in read_video(output).comment


def test_segments_of_a_source_that_has_changed_are_not_taken(tmp_path: Path) -> None:
    source, output = write_video(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    with pytest.raises(StopError):
        convert(source, output, None, stop_after(7))
    write_video(source, STEADY)
    with pytest.raises(RequestError, match="source_version"):
        convert(source, output)


def test_a_full_disk_is_one_line_and_keeps_the_segments(mount_disk, tmp_path: Path) -> None:
    disk = mount_disk("40k")
    source = write_video(tmp_path / "in.mp4", STEADY, noise=True, sound=None)
    with pytest.raises(DiskFullError, match=f"the disk of {disk}.* is full: free some space or .*same command"):
        convert(source, disk / "out.mp4", segment_frames=2)
    assert (disk / "out.mp4.segments" / "000000.nut").exists()
    assert not (disk / "out.mp4").exists()


def test_a_full_disk_while_segments_are_joined(mount_disk, tmp_path: Path) -> None:
    """It takes as much space again."""
    source = write_video(tmp_path / "in.mp4", STEADY, noise=True, sound=None)
    convert(source, tmp_path / "out.mp4")
    disk = mount_disk(f"{int((tmp_path / 'out.mp4').stat().st_size * 1.5)}")
    with pytest.raises(DiskFullError, match=r"the disk of .*out.mp4 is full"):
        convert(source, disk / "out.mp4")
    assert len(list((disk / "out.mp4.segments").glob("*.nut"))) == 3
    assert not (disk / "out.mp4").exists()


# Sources that are not whole


@pytest.mark.parametrize(("name", "least", "most"), [("in.mp4", 8, 11), ("in.mkv", 4, 8)])
def test_of_a_truncated_video_what_can_be_decoded_is_written(name: str, least: int, most: int, tmp_path: Path) -> None:
    source, output = write_video(tmp_path / name, noise=True), tmp_path / "out.mp4"
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 7 // 10])
    progress = convert(source, output)
    assert least <= progress.frames <= most
    assert "are missing" in (progress.problem or "")
    made = read_video(output)
    assert len(made.times) == progress.frames
    assert len(made.sound) < 17, "the sound ends with the frames"


def test_packets_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    source = write_video(tmp_path / "in.mp4", STEADY, noise=True, sound=None)
    data = bytearray(source.read_bytes())
    middle = len(data) * 6 // 10
    data[middle : middle + 6000] = bytes(6000)
    source.write_bytes(data)
    progress = convert(source, tmp_path / "out.mp4")
    assert progress.damaged > 0
    assert progress.frames == 12 - progress.damaged
    assert len(read_video(tmp_path / "out.mp4").times) == progress.frames


def nothing(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def text(path: Path) -> Path:
    path.write_text("this is no video\n" * 100)
    return path


def only_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    return path


def only_a_header(path: Path) -> Path:
    """All frames but their packets' data."""
    write_video(path, sound=None)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path, "is not there: expected a video file, an address or a device"),
        (nothing, "cannot be read as a video"),
        (text, "cannot be read as a video"),
        (lambda path: path.mkdir() or path, "cannot be read as a video"),
        (only_sound, "has no video: expected a file or an address with one"),
        (only_a_header, "has no frames that can be decoded"),
    ],
)
def test_a_source_without_frames_is_one_line(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    source = write(tmp_path / ("in.mkv" if write is only_sound else "in.mp4"))
    with pytest.raises(RequestError, match=message) as error:
        convert(source, tmp_path / "out.mp4")
    assert str(error.value).startswith(str(source))
    assert not (tmp_path / "out.mp4").exists()
    assert not (tmp_path / "out.mp4.segments").exists()


# Outputs that cannot be written


def test_wrong_outputs_are_rejected_before_any_frame(source: Path, tmp_path: Path) -> None:
    pipe = FramePipe()
    (tmp_path / "there.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    for name, message, words in (
        ("out.avi", r"out.avi: expected a name that ends in .mp4, .m4v, .mov, .mkv, .webm", {}),
        ("there.mp4", "there.mp4 is there: --replace overwrites it, or choose another name", {}),
        ("folder.mp4", "folder.mp4 is a folder: expected a file name", {"replace": True}),
        ("out.webm", r"\.webm does not take the sound of .* .aac.: name the output \*.mkv, or .*--no-audio", {}),
    ):
        with pytest.raises(RequestError, match=message):
            convert(source, tmp_path / name, pipe, **words)
    with pytest.raises(RequestError, match="is the source itself"):
        convert(source, source, pipe, replace=True)
    assert pipe.calls == []
    convert(source, tmp_path / "there.mp4", replace=True)
    assert len(read_video(tmp_path / "there.mp4").times) == 12


def test_a_folder_that_cannot_be_made_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .Not a directory."):
        convert(source, tmp_path / "file" / "out.mp4")


# Cameras and streams


def test_a_device_is_read_by_its_format(tmp_path: Path) -> None:
    """FFmpeg's test pattern, in real time, stands in for a camera; times are kept where frames are left out."""
    pipe = FramePipe(lambda params: threading.Event().wait(0.05) and None)
    camera = "testsrc=size=70x50:rate=60:duration=1,realtime"
    progress = convert(camera, tmp_path / "out.mp4", pipe, format="lavfi")
    made = read_video(tmp_path / "out.mp4")
    assert progress.frames + progress.dropped == 60
    assert 3 <= progress.frames <= 21
    assert len(made.times) == progress.frames
    assert float(made.times[-1] - made.times[0]) == pytest.approx(1, abs=0.2)


def test_an_interruption_ends_a_camera_and_its_video_is_written(tmp_path: Path) -> None:
    camera = "testsrc=size=64x64:rate=60,realtime"
    progress = convert(camera, tmp_path / "out.mp4", None, stop_after(7, KeyboardInterrupt), format="lavfi")
    assert progress.interrupted
    assert len(read_video(tmp_path / "out.mp4").times) == progress.frames == 7


def test_a_camera_without_a_frame_yet_is_asked_again(source: Path) -> None:
    """As FFmpeg's avfoundation, which does not wait for the next one."""

    class Hesitant:
        def __init__(self, container: Any) -> None:
            self.container, self.calls = container, 0

        def demux(self, stream: Any) -> Iterator[Any]:
            self.calls += 1
            if self.calls < 3:
                raise av.error.BlockingIOError(35, "Resource temporarily unavailable")
            yield from self.container.demux(stream)

        def close(self) -> None:
            self.container.close()

    with VideoSource(str(source)) as video:
        video._container = hesitant = Hesitant(video._container)
        assert len(list(video.frames())) == 12
    assert hesitant.calls == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"format": "v4l2"}, "/dev/video77 is not there: expected a video file, an address or a device"),
        ({"format": "nonsense"}, "/dev/video77: .*nonsense.*: expected one that `ffmpeg -formats` lists"),
    ],
)
def test_a_camera_that_is_not_there(words: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        convert("/dev/video77", tmp_path / "out.mp4", **words)


@pytest.fixture
def going_away(tmp_path: Path) -> Iterator[str]:
    """The address of a stream on this machine that breaks off in the middle."""
    data = write_video(tmp_path / "stream.mkv", noise=True).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) * 7 // 10])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/stream.mkv"
        server.shutdown()


def test_of_a_camera_that_goes_away_the_frames_until_then_are_written(going_away: str, tmp_path: Path) -> None:
    progress = convert(going_away, tmp_path / "out.mp4")
    assert progress.problem
    assert 1 <= progress.frames < 12
    assert len(read_video(tmp_path / "out.mp4").times) == progress.frames


def test_the_newest_item_is_given_out() -> None:
    """Items that nobody took are counted; the error of their source comes after the last of them."""
    taken, goes_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        taken.wait(10)
        yield from (1, 2, 3)
        goes_on.set()
        raise OSError("gone")

    newest = Newest(items())
    found = iter(newest)
    assert next(found) == 0
    taken.set()
    assert goes_on.wait(10)
    assert next(found) == 3
    with pytest.raises(OSError, match="gone"):
        next(found)
    assert newest.dropped == 2
