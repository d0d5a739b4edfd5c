"""A stream: an image for each frame of a sequence of any length, such as a video or a camera."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import RequestError
from ..samplers.noise import random_seed
from ..samplers.numbers import whole_number
from .control_images import check_opencv, preprocess
from .image_files import SMALLEST_SIDE, fit, to_rgb
from .params import Params
from .request import Request
from .similar_frames import SimilarFrames

if TYPE_CHECKING:
    from .pipeline import Pipeline

MOST_AHEAD = 64
#: params that cannot change while a stream runs
FIXED = ("height", "width", "resize_mode", "output_type", "control_image")
#: params that a stream does not take, and its reason
WITHOUT = {
    "image": "the frames are the images",
    "generator": "give a seed, which every frame starts from",
    "latents": "give a seed, which every frame starts from",
    "padding_mask_crop": "frames are fitted to the size of the images first",
}
_END = object()
_Tasks = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Stream(Iterator[Any]):
    """The images of a sequence of frames, in order, one each: the value of :meth:`.pipeline.Pipeline.stream`.

    The image of a frame is that of a call of its own, ``pipe(prompt, image=frame, seed=stream.seed, ...)``, to the
    pixel. While the caller handles an image, one thread generates the next one, and while that is generated and the
    caller waits for it, another thread reads and fits the frame after it. No more than ``look_ahead`` frames are read
    before the caller asks for their images, so memory is constant. On a CPU ``look_ahead`` images are generated side
    by side; on a GPU they take turns, and the work of the host overlaps with them.

    An error of the frames' own iterator, or of a frame, is raised in that frame's place, after the images of all
    frames before it, and ends the stream. :meth:`close` ends it early, as does the end of a ``with`` block.

    Args:
        pipe: generates the images.
        frames: init images as in :class:`.params.Params`, or uint8 arrays [H, W, 3] of any size. Another thread
            iterates over them.
        params: of every image; ``image``, ``generator``, ``latents`` and ``padding_mask_crop`` are None. Without a
            ``seed`` one is drawn for all frames.
        control: names of ControlNets that see the frames themselves, preprocessed as the bundle says.
        skip_similar: give the last image again for frames that are like its own: the cosine, below 1, from which on a
            frame may be skipped, such as 0.98 (:class:`.similar_frames.SimilarFrames`).
        look_ahead: number of images that are begun before they are asked for.

    Attributes:
        given: number of images that were given out.
        skipped: number of them that repeat the one before, because their frames are similar.

    Raises:
        RequestError: a param is out of range.
    """

    def __init__(
        self,
        pipe: Pipeline,
        frames: Iterable[Any],
        params: Params,
        *,
        control: str | Sequence[str] = (),
        skip_similar: float | None = None,
        look_ahead: int = 1,
    ) -> None:
        look_ahead = whole_number("look_ahead", look_ahead, 1, MOST_AHEAD)
        self._pipe, self._source = pipe, iter(frames)
        self._controls = _control_kinds(pipe, control, params)
        seed = random_seed() if params.seed is None else params.seed
        self._params, self._request = self._checked(dataclasses.replace(params, seed=seed))
        self._similar = None if skip_similar is None else SimilarFrames(skip_similar, (self._request.seeds or (0,))[0])
        self._changes = self._seen_changes = 0
        self.given = self.skipped = 0
        # torch's current stream is a thread's own: tensors from a worker's thread are for the stream of the caller.
        self._caller = torch.cuda.current_stream(pipe.device) if pipe.device.type == "cuda" else None
        self._has_ended = False
        self._reader, self._workers = _Reader(), ThreadPoolExecutor(look_ahead, "hypersd-stream")
        self._end = weakref.finalize(self, _end, self._reader, self._workers)
        self._look_ahead = look_ahead
        self._reads: deque[Future[tuple[Future[Any] | None, bool]]] = deque()
        self._last: Future[Any] | None = None

    @property
    def params(self) -> Params:
        """The params of the images that are begun from now on, without their frames."""
        return self._params

    @property
    def request(self) -> Request:
        """Those params with every decision made."""
        return self._request

    @property
    def seed(self) -> Any:
        """The seed of every image that is begun from now on."""
        return self._params.seed

    def update(self, **words: Any) -> None:
        """Change params, such as ``prompt``, ``seed`` and ``strength``, for all frames whose image is not yet begun.

        At most ``look_ahead`` images that are begun or finished come before the first one with the change. Any thread
        may call it.

        Raises:
            RequestError: a value is out of range, or cannot change within a stream; then nothing has changed.
        """
        if fixed := [name for name in FIXED if name in words]:
            raise RequestError(f"{fixed[0]} cannot change within a stream: begin another one")
        params = dataclasses.replace(self._params, **words)
        if params.seed is None:
            params = dataclasses.replace(params, seed=self.seed)
        self._params, self._request = self._checked(params)
        self._changes += 1

    def close(self) -> None:
        """End the stream and its threads; a second call does nothing.

        Images in work are waited for. A read that does not return, as of a camera without a signal, is not: its thread
        ends after it.
        """
        self._has_ended = True
        self._end()
        self._workers.shutdown(wait=True)
        self._reads.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        try:
            while not self._has_ended and len(self._reads) <= self._look_ahead:
                self._reads.append(self._reader.submit(self._read))
            if self._has_ended:
                raise StopIteration
            job, is_repeated = self._reads.popleft().result()
            if job is None:
                raise StopIteration
            image = job.result()
        except BaseException as error:
            has_ended = self._has_ended  # by another thread
            self.close()
            if has_ended and isinstance(error, CancelledError):
                raise StopIteration from None
            raise
        self.given += 1
        self.skipped += is_repeated
        return image if self._similar is None else _copy(image)  # it may be given out once more

    def _read(self) -> tuple[Future[Any] | None, bool]:
        """Read and fit the next frame, and begin its image; None at the end. It runs in the reader's thread.

        Besides, whether the image is the last one's.
        """
        if self._has_ended or (frame := next(self._source, _END)) is _END:
            self._source = iter(())
            return None, False
        frame = self._fitted(frame)
        if self._similar is not None:
            if (changes := self._changes) != self._seen_changes:
                self._seen_changes = changes
                self._similar.forget()
            if self._similar.skips(_values(frame)):
                return self._last, True
        self._last = self._workers.submit(self._generate, frame)
        return self._last, False

    def _generate(self, frame: Any) -> Any:
        """The image of a frame; it runs in a worker's thread."""
        with torch.cuda.stream(self._caller):
            return self._pipe.generate(self._params_of(self._params, frame)).images[0]

    def _params_of(self, params: Params, frame: Any) -> Params:
        """The params with a frame of the output size as the init image, and as control image if it is one."""
        controls = {}
        if self._controls:
            image = _as_pil(frame)
            controls["control_image"] = {name: preprocess(image, kind) for name, kind in self._controls.items()}
        return dataclasses.replace(params, image=frame, **controls)

    def _checked(self, params: Params) -> tuple[Params, Request]:
        """The params and their request, if images of frames can be generated with them."""
        for name, reason in WITHOUT.items():
            if getattr(params, name) is not None:
                raise RequestError(f"{name} is not for a stream: {reason}")
        if params.output_type not in ("pil", "np", "pt"):
            raise RequestError(f"output_type {params.output_type!r} is not for a stream: expected pil, np or pt")
        blank = Image.new("RGB", (SMALLEST_SIDE, SMALLEST_SIDE))
        request = self._pipe.decide(self._params_of(params, blank))
        if request.batch != 1:
            raise RequestError(f"{request.batch} images for each frame: a stream takes one prompt and makes one image")
        return params, request

    def _fitted(self, frame: Any) -> Any:
        """A frame of the output size; floats have it already, which generating them checks."""
        if isinstance(frame, np.ndarray) and frame.dtype == np.uint8:
            if frame.ndim != 3 or frame.shape[2] != 3:
                raise RequestError(f"frame: an array uint8{list(frame.shape)}: expected [H, W, 3], red, green, blue")
            frame = Image.fromarray(frame)
        if not isinstance(frame, Image.Image):
            return frame
        return fit(to_rgb(frame), self._request.width, self._request.height, self._params.resize_mode)


def _control_kinds(pipe: Pipeline, control: str | Sequence[str], params: Params) -> dict[str, str]:
    """How the frames are preprocessed, by the name of the ControlNets that see them."""
    names = (control,) if isinstance(control, str) else tuple(control)
    known = pipe.manifest.controlnets
    if unknown := [name for name in names if name not in known]:
        words = f"it has {', '.join(known)}" if known else "it was exported without any: export with --controlnet"
        raise RequestError(f"control {unknown[0]!r}: the bundle has no such ControlNet, {words}")
    if names and params.control_image is not None:
        raise RequestError("control and control_image: give one of the two")
    kinds = {name: known[name].preprocess for name in names}
    if "canny" in kinds.values():
        check_opencv()
    return kinds


def _values(frame: Any) -> np.ndarray:
    """The values of a frame's pixels in -1..1."""
    if isinstance(frame, Image.Image):
        return np.asarray(frame, np.float32) / 127.5 - 1
    return np.asarray(frame.cpu() if isinstance(frame, Tensor) else frame, np.float32) * 2 - 1


def _as_pil(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame
    pixels = frame.permute(1, 2, 0).float().cpu().numpy() if isinstance(frame, Tensor) else frame
    return Image.fromarray(np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def _copy(image: Any) -> Any:
    return image.clone() if isinstance(image, Tensor) else image.copy()


def _end(reader: _Reader, workers: ThreadPoolExecutor) -> None:
    reader.end()
    workers.shutdown(wait=False, cancel_futures=True)


class _Reader:
    """Runs tasks one after the other in a thread that does not keep Python from ending, whatever it waits for."""

    def __init__(self) -> None:
        self._tasks: _Tasks = SimpleQueue()
        self._unfinished: set[Future[Any]] = set()
        threading.Thread(target=_run_tasks, args=(self._tasks,), name="hypersd-frames", daemon=True).start()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        self._tasks.put((future, task))
        return future

    def end(self) -> None:
        """Cancel all tasks, also the one that runs: nobody waits for it any more."""
        self._tasks.put(None)
        for future in tuple(self._unfinished):
            future.cancel()


def _run_tasks(tasks: _Tasks) -> None:
    for future, task in iter(tasks.get, None):
        if future.cancelled():
            continue
        with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
            try:
                future.set_result(task())
            except BaseException as error:  # whoever waits for the task gets it
                future.set_exception(error)
        del future, task  # or they, and the stream with them, would stay until the next task
