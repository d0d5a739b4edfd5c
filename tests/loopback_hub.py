"""A Hugging Face Hub on 127.0.0.1, so that tests meet the real client and the real protocol without any network.

    with LoopbackHub(root) as hub:                     # root/<owner>/<name>/<files>
        subprocess.run(..., env={**os.environ, **hub.environment(cache)})
        hub.requests                                   # what was asked, in order

It speaks what `huggingface_hub` needs to list, download and upload models (tests/loopback_uploads.py).
As on the real Hub, large files (here: from 1 KiB)
are LFS files: their metadata comes on a redirect to another origin (here: another port) that serves the bytes and needs
no token.
Valid revisions are "main" and `hub.commit(repo_id)`. Xet is not spoken.

Also a program:  python tests/loopback_hub.py ROOT --port 8080
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, unquote, urlsplit

from loopback_uploads import LFS_BYTES, Refusal, Uploads

_CHUNK = 1 << 16
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?"
)


@dataclass(kw_only=True)
class Request:
    method: str
    path: str
    range: str | None
    authorized: bool  # an Authorization header came with it, right or wrong
    cdn: bool
    status: int = 0
    sent: int = 0  # bytes of the file


@dataclass(kw_only=True)
class _Fault:
    suffix: str
    after: int
    times: int
    kind: str  # cut: the connection ends; reset: it is reset; stall: it stays open, silent


class _ErrorAnswer(Exception):  # noqa: N818
    def __init__(
        self, status: int, message: str, code: str | None = None, fields: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.fields = status, message, code, fields or {}


@cache
def _digest(path: Path, size: int, _mtime_ns: int) -> str:
    """SHA-256 for what the Hub keeps in LFS, git's blob hash for the rest."""
    digest = hashlib.sha256() if size >= LFS_BYTES else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _etag(path: Path) -> str:
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


class LoopbackHub:
    def __init__(self, root: Path | str, *, port: int = 0, token: str = "hf_loopback") -> None:
        self.root = Path(root).resolve()
        self.token = token
        self.gated: set[str] = set()
        self.requests: list[Request] = []
        self._faults: list[_Fault] = []
        self._failures: list[int] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._hub, self._cdn = (self._server(cdn=False, port=port), self._server(cdn=True, port=0))
        self.uploads = Uploads(self.root, self.url)

    def _server(self, *, cdn: bool, port: int) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "cdn": cdn})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads = True
        server.block_on_close = False
        return server

    def __enter__(self) -> LoopbackHub:
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def cdn_url(self) -> str:
        # another host name, so that clients see another origin also where they compare only names
        return f"http://localhost:{self._cdn.server_port}"

    def environment(self, cache_dir: Path | str) -> dict[str, str]:
        """Environment variables for a process that uses this Hub and a cache of its own, and nothing of the user's."""
        home = Path(cache_dir)
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": "",
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HTTP_PROXY": "",
            "http_proxy": "",
            "ALL_PROXY": "",
            "all_proxy": "",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def commit(self, repo_id: str) -> str:
        """The only commit of the repository; another one as soon as a file changes."""
        folder = self.root / repo_id
        digest = hashlib.sha1(repo_id.encode())
        for path in self.files(repo_id):
            stat = (folder / path).stat()
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def files(self, repo_id: str) -> list[str]:
        folder = self.root / repo_id
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def cut_after(self, path_suffix: str, nbytes: int, *, times: int = 1, reset: bool = False) -> None:
        """The next `times` downloads of such a file end after `nbytes` of the answer (with `reset`: by a TCP reset)."""
        self._faults.append(_Fault(suffix=path_suffix, after=nbytes, times=times, kind="reset" if reset else "cut"))

    def stall_after(self, path_suffix: str, nbytes: int, *, times: int = 1) -> None:
        """The next `times` downloads of such a file fall silent after `nbytes` of the answer."""
        self._faults.append(_Fault(suffix=path_suffix, after=nbytes, times=times, kind="stall"))

    def fail_with(self, status: int, times: int = 1) -> None:
        """The next `times` requests are answered with this status."""
        self._failures += [status] * times

    def bytes_sent(self, path_suffix: str) -> int:
        return sum(request.sent for request in self.requests if request.path.endswith(path_suffix))

    def forget_requests(self) -> None:
        self.requests.clear()

    def _next_failure(self) -> int | None:
        with self._lock:
            return self._failures.pop(0) if self._failures else None

    def _next_fault(self, path: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and path.endswith(fault.suffix):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    cdn: bool
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self._request = Request(
            method=self.command,
            path=unquote(path),
            range=self.headers.get("Range"),
            authorized="Authorization" in self.headers,
            cdn=self.cdn,
        )
        self.hub.requests.append(self._request)  # before the answer: who got it may look here at once
        try:
            self._route(path)
        except _ErrorAnswer as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self._send(
                json.dumps({"error": error.message, **error.fields}).encode(), headers=headers, status=error.status
            )
        except ConnectionError:
            self.close_connection = True  # the client went away

    def _route(self, path: str) -> None:
        failure = self.hub._next_failure()
        if failure is not None:
            raise _ErrorAnswer(failure, "injected failure")
        if self.command in ("POST", "PUT"):
            return self._receive(path)
        if self.cdn:
            return self._send_file(self._inside(self.hub.root, unquote(path.removeprefix("/cdn/"))), headers={})
        if match := _RESOLVE.fullmatch(path):
            return self._resolve(match["repo"], unquote(match["revision"]), unquote(match["path"]))
        if match := _API.fullmatch(path):
            repo_id, revision = match["repo"], unquote(match["revision"] or "main")
            commit = self._check(repo_id, revision, gate=False)
            answer = self._tree(repo_id, unquote(match["path"] or "")) if match["what"] == "tree" else None
            return self._send_json(answer if answer is not None else self._info(repo_id, commit))
        raise _ErrorAnswer(404, "Not Found")

    def _receive(self, path: str) -> None:
        """Take an upload from whoever has the token; an object's address needs none."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        uploads = self.hub.uploads
        if self.command == "PUT":
            answer = uploads.put(path, body)
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            answer = Refusal(401, "Invalid username or password.")
        else:
            answer = uploads.post(path, body)
        if isinstance(answer, Refusal):
            raise _ErrorAnswer(answer.status, answer.message, fields=answer.fields)
        self._send_json(answer or {})

    def _check(self, repo_id: str, revision: str, *, gate: bool = True) -> str:
        """The commit, or the error that the Hub answers with."""
        hub = self.hub
        token = self.headers.get("Authorization")
        if token is not None and token != f"Bearer {hub.token}":
            raise _ErrorAnswer(401, "Invalid credentials in Authorization header")
        if not self._inside(hub.root, repo_id).is_dir():
            # The Hub tells only who is logged in that there is no such repository.
            status, message = (401, "Invalid username or password.") if token is None else (404, "Repository not found")
            raise _ErrorAnswer(status, message, "RepoNotFound")
        if gate and repo_id in hub.gated and token is None:
            message = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated."
            raise _ErrorAnswer(401, message, "GatedRepo")
        commit = hub.commit(repo_id)
        if revision not in ("main", commit):
            raise _ErrorAnswer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    @staticmethod
    def _inside(root: Path, relative: str) -> Path:
        path = (root / relative).resolve()
        if not path.is_relative_to(root):
            raise _ErrorAnswer(404, "Not Found")
        return path

    def _resolve(self, repo_id: str, revision: str, relative: str) -> None:
        commit = self._check(repo_id, revision)
        path = self._inside(self.hub.root / repo_id, relative)
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            return self._send(
                b"Entry not found",
                headers={**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
                status=404,
            )
        size = path.stat().st_size
        if size < LFS_BYTES:
            return self._send_file(path, headers={**headers, "ETag": f'"{_etag(path)}"'})
        location = f"{self.hub.cdn_url}/cdn/{repo_id}/{quote(relative)}"
        headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{_etag(path)}"', "Location": location}
        self._send(f"Found. Redirecting to {location}".encode(), headers=headers, status=302)

    def _info(self, repo_id: str, commit: str) -> dict[str, object]:
        siblings = [{"rfilename": path} for path in self.hub.files(repo_id)]
        gated = "auto" if repo_id in self.hub.gated else False
        readme = self.hub.root / repo_id / "README.md"
        licence = re.search(r"^license: (\S+)$", readme.read_text(), re.MULTILINE) if readme.is_file() else None
        card = {"cardData": {"license": licence[1]}} if licence else {}
        return {
            **card,
            "id": repo_id,
            "sha": commit,
            "private": False,
            "gated": gated,
            "tags": [],
            "siblings": siblings,
        }

    def _tree(self, repo_id: str, below: str) -> list[dict[str, object]]:
        """Files at any depth, as the Hub lists them with `recursive=True`."""
        entries: list[dict[str, object]] = []
        for relative in self.hub.files(repo_id):
            if below and not relative.startswith(f"{below}/"):
                continue
            path = self.hub.root / repo_id / relative
            size, etag = path.stat().st_size, _etag(path)
            entry: dict[str, object] = {"type": "file", "path": relative, "size": size, "oid": etag[:40]}
            if size >= LFS_BYTES:
                entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 130}
            entries.append(entry)
        if below and not entries:
            raise _ErrorAnswer(404, f"{below} does not exist", "EntryNotFound")
        return entries

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _send(self, body: bytes, *, headers: dict[str, str], status: int = 200) -> None:
        self._send_head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self._request.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, path: Path, *, headers: dict[str, str]) -> None:
        if not path.is_file():
            raise _ErrorAnswer(404, "Not Found")
        size = path.stat().st_size
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            if start >= size:
                return self._send(b"", headers={"Content-Range": f"bytes */{size}"}, status=416)
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self._send_head(status, {"Content-Length": str(size - start), **headers})
        if self.command == "GET":
            self._send_body(path, start, self.hub._next_fault(unquote(urlsplit(self.path).path)))

    def _send_body(self, path: Path, start: int, fault: _Fault | None) -> None:
        left = path.stat().st_size - start
        if fault is not None:
            left = min(left, fault.after)
        with path.open("rb") as file:
            file.seek(start)
            while left and (chunk := file.read(min(left, _CHUNK))):
                self._request.sent += len(chunk)
                self.wfile.write(chunk)
                left -= len(chunk)
        if fault is not None:
            self._break(fault)

    def _break(self, fault: _Fault) -> None:
        self.close_connection = True
        if fault.kind == "stall":
            while not self.hub._closing.wait(0.05) and not self._client_left():
                pass
        elif fault.kind == "reset":
            self.hub._closing.wait(0.3)  # a reset throws away what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _client_left(self) -> bool:
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.setblocking(True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve ROOT/<owner>/<name>/<files> as a Hugging Face Hub on 127.0.0.1."
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with LoopbackHub(arguments.root, port=arguments.port) as hub:
        with suppress(KeyboardInterrupt):
            print(f"HF_ENDPOINT={hub.url}", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
