"""A program that imports libraries once, and forks a process that has them for each command that it is asked for.

    python preloading.py SOCKET LIBRARY...

Each message of the socket (an open file descriptor) is one byte with four descriptors: a connection, and the command's
stdin, stdout and stderr. The connection brings the command as JSON; it gets the process's id, and its exit code when
it has ended. The id stays the process's own until the connection is closed.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from typing import Any


def serve(control: socket.socket) -> tuple[int, ...]:
    """Serve until the socket is closed; return in the process of a command alone, with its descriptors."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait for a command
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return tuple(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def fork_command(link: int, *streams: int) -> dict[str, Any]:
    """Fork the command, in whose process alone this returns, with what it is to be."""
    connection = socket.socket(fileno=link)
    asked = json.loads(connection.makefile().readline())
    if pid := os.fork():
        for stream in streams:
            os.close(stream)
        _report(connection, pid)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return asked


def _report(connection: socket.socket, pid: int) -> None:
    connection.sendall(f"{pid}\n".encode())
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    connection.sendall(f"{code}\n".encode())
    connection.recv(1)  # nothing: it is closed
    os.waitpid(pid, 0)
    os._exit(0)


def become(asked: dict[str, Any]) -> None:
    """Take on a command's session, cores, folder, environment and words."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked["cores"]:
        os.sched_setaffinity(0, asked["cores"])
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.path[0] = os.getcwd()
    sys.argv[:] = asked["words"]


def run(option: str, code: str) -> None:
    """Run as ``python -m MODULE`` or ``python -c PROGRAM`` do."""
    if option == "-m":
        del sys.argv[0]
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        del sys.argv[1]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def read_torchlib_once() -> None:
    """Keep the table of operators of torch's exporter, which each trace would read from the source of 600 functions.

    That is a quarter of what the trace of a tiny network takes. Exports in fresh processes do read it each time.
    """
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(registration, "ONNXRegistry", None)
    read = getattr(registry, "from_torchlib", None)
    if read is not None and not hasattr(read, "cache_info"):
        registry.from_torchlib = staticmethod(functools.cache(read))


if __name__ == "__main__":
    for library in sys.argv[2:]:
        importlib.import_module(library)
    read_torchlib_once()
    gc.collect()
    gc.freeze()  # collections in a command would copy all pages
    become(fork_command(*serve(socket.socket(fileno=int(sys.argv[1])))))
    run(*sys.argv[:2])
