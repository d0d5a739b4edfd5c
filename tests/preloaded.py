"""Python processes that begin with the large libraries imported: a fresh one spends seconds on that.

`start` and `run` do what `subprocess.Popen` and `subprocess.run` do with ``[sys.executable, *words]`` and text. All of
the command is real but the imports: process, signals, folder, environment, streams, exit code. The package itself is
not imported beforehand, nor are the libraries of the Hub for a command with other variables of theirs, which they read
when they are imported. Each command has a test with a fresh process besides (tests/cli).
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

PROGRAM = Path(__file__).with_name("preloading.py")
LIBRARIES = (
    "numpy", "PIL.Image", "rich.console", "rich.progress", "safetensors.torch", "tokenizers",
    "torch", "torch._dynamo", "torch.export", "torch.onnx._internal.exporter._registration",
    "onnx", "onnx_ir", "onnxscript",
)  # fmt: skip
HUB_LIBRARIES = (
    "transformers.models.clip.modeling_clip", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_tiny", "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.controlnets.controlnet",
)  # fmt: skip
READ_BY_HUB_LIBRARIES = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "DIFFUSERS_", "XDG_", "HOME")  # when imported
READ_AT_START = ("OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTHON", "LD_", "MALLOC_")  # by Python or these libraries


@functools.cache
def _server(*libraries: str) -> socket.socket:
    """The socket of a process with these libraries, which ends with this one."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, str(PROGRAM), str(theirs.fileno()), *libraries]
    subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
    theirs.close()
    return ours


class Process:
    """What `subprocess.Popen` is of a fresh process. Line ends of its streams are not translated."""

    def __init__(self, words: tuple[str, ...], cwd: Path | None, env: Mapping[str, str], **streams: Any) -> None:
        changed = {name for name in env.keys() | os.environ.keys() if env.get(name) != os.environ.get(name)}
        read_at_start = {name for name in changed if name.startswith(READ_AT_START)}
        assert not read_at_start, f"{read_at_start} act at the start of a process: start a fresh one"
        hub = () if any(name.startswith(READ_BY_HUB_LIBRARIES) for name in changed) else HUB_LIBRARIES
        self.args, self.returncode = words, None
        self.stdin, stdin = _open(streams["stdin"], 0)
        self.stdout, stdout = _open(streams["stdout"], 1)
        self.stderr, stderr = (
            (None, os.dup(stdout)) if streams["stderr"] == subprocess.STDOUT else _open(streams["stderr"], 2)
        )
        self._link, link = socket.socketpair()
        descriptors = [link.detach(), stdin, stdout, stderr]
        socket.send_fds(_server(*LIBRARIES, *hub), [b"."], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        cores = list(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        asked = {"words": words, "cwd": str(cwd or Path.cwd()), "env": dict(env), "cores": cores}
        self._link.sendall(json.dumps(asked).encode() + b"\n")
        self._answers = self._link.makefile("rb", buffering=0)
        self.pid = int(self._answers.readline())

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            stream.close()
        self.wait()

    def poll(self) -> int | None:
        """The exit code, a signal's number with a minus, or None."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._link], [], [], timeout)[0]:
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._link.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """The rest of stdout and stderr, once it has ended. After ``timeout`` seconds it is killed."""
        late = threading.Event()

        def end() -> None:
            late.set()
            os.kill(self.pid, signal.SIGKILL)

        watch = threading.Timer(timeout or threading.TIMEOUT_MAX, end)
        watch.daemon = True
        watch.start()
        with ThreadPoolExecutor(1) as pool:
            out = pool.submit(_read, self.stdout)
            err = _read(self.stderr)
        self.wait()
        watch.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(self.args, timeout or 0, out.result(), err)
        return out.result(), err


def _open(wanted: Any, number: int) -> tuple[IO[str] | None, int]:
    """Our end of a stream, if it is a pipe, and the process's."""
    if wanted == subprocess.PIPE:
        reading, writing = os.pipe()
        if number == 0:
            return open(writing, "w"), reading
        return open(reading, newline=""), writing
    if wanted == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_RDWR)
    return None, os.dup(number if wanted is None else wanted if isinstance(wanted, int) else wanted.fileno())


def _read(stream: IO[str] | None) -> str | None:
    if stream is None or stream.closed:  # it was read before
        return None
    with stream:
        return stream.read()


def start(
    *words: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
) -> Process:
    """Start ``python *words``: ``-m MODULE`` or ``-c PROGRAM``, and arguments."""
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    return Process(tuple(map(str, words)), cwd, os.environ if env is None else env, **streams)


def run(
    *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python *words`` to its end, its output in pipes."""
    process = start(*words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
