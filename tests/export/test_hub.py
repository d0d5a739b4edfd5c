"""Downloads from the Hub, with the real client and a Hub on 127.0.0.1: no test here reaches any other machine.

`huggingface_hub` reads its environment when it is imported, so each download runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loopback_hub import LoopbackHub
from waiting import wait_until

REPO = "acme/model"
WEIGHTS = "unet/model.safetensors"
CHUNK = 64 * 1024
SIZE = 16 * CHUNK

# Small chunks, so that small files are cut in the middle; no pauses between retries, so that tests are quick.
DRIVER = f"""
import json, sys, time
from types import SimpleNamespace
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
time.sleep = lambda seconds: None
from hypersd.errors import HyperSDError
from hypersd.engines import hub

arguments = json.loads(sys.argv[1])
call, with_progress = arguments.pop("call"), arguments.pop("with_progress")
exec(arguments.pop("before"))
events = []
if with_progress:
    arguments["progress"] = SimpleNamespace(
        start=lambda filename, total: events.append(("start", filename, total)),
        advance=lambda n: events.append(("advance", n)),
        finish=lambda: events.append(("finish",)),
    )
try:
    file = getattr(hub, call)(**arguments)
    answer = None if file is None else dict(path=str(file.path), revision=file.revision, filename=file.filename)
    error = None
except HyperSDError as caught:
    answer, error = None, dict(
        kind=type(caught).__name__, message=str(caught), exit_code=caught.exit_code, cause=caught.__cause__ is not None
    )
print(json.dumps(dict(answer=answer, error=error, events=events)))
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    answer: dict[str, Any] | None
    error: dict[str, Any] | None
    events: list[list[Any]]
    stderr: str

    @property
    def path(self) -> Path:
        assert self.answer is not None, self.error
        return Path(self.answer["path"])

    def fails(self, kind: str, *words: str) -> dict[str, Any]:
        assert self.error is not None, self.answer
        message = self.error["message"]
        assert self.error["kind"] == kind, message
        assert "\n" not in message
        for word in words:
            assert word in message
        return self.error


@dataclass(frozen=True, kw_only=True)
class Client:
    """A machine with a cache of its own."""

    hub: LoopbackHub
    home: Path

    def start(
        self,
        filename: str = WEIGHTS,
        *,
        repo_id: str = REPO,
        revision: str | None = None,
        call: str = "fetch",
        with_progress: bool = False,
        before: str = "",
        **environment: str,
    ) -> subprocess.Popen[str]:
        arguments = {"repo_id": repo_id, "filename": filename, "revision": revision}
        switches = {"call": call, "with_progress": with_progress, "before": before}
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(arguments | switches)],
            env={**os.environ, **self.hub.environment(self.home), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fetch(self, filename: str = WEIGHTS, **options: Any) -> Outcome:
        process = self.start(filename, **options)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        return Outcome(**json.loads(stdout), stderr=stderr)

    @property
    def blobs(self) -> Path:
        return self.home / "hub" / "models--acme--model" / "blobs"

    @property
    def partial(self) -> Path:
        return self.blobs / f".{hashlib.sha256(weights()).hexdigest()}.partial"


def weights() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture(name="hub")
def _hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    repo = tmp_path / "served" / REPO
    (repo / "unet").mkdir(parents=True)
    (repo / "config.json").write_text('{"a": 1}')
    (repo / WEIGHTS).write_bytes(weights())
    with LoopbackHub(tmp_path / "served") as hub:
        yield hub


@pytest.fixture(name="client")
def _client(hub: LoopbackHub, tmp_path: Path) -> Client:
    return Client(hub=hub, home=tmp_path / "home")


def file_requests(hub: LoopbackHub, method: str = "GET") -> list[Any]:
    return [request for request in hub.requests if request.method == method and request.cdn]


def test_the_module_is_cheap_to_import() -> None:
    """The command line imports it early: nothing heavy, and nothing that reads HF_* too early."""
    code = "import sys, hypersd.engines.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_download_lies_in_the_cache_as_other_tools_expect_it(client: Client, hub: LoopbackHub) -> None:
    """The cache is shared with diffusers and transformers; a bar or a message in a log would be noise."""
    small, large = client.fetch("config.json"), client.fetch()
    commit = hub.commit(REPO)
    snapshot = client.home / "hub" / "models--acme--model" / "snapshots" / commit
    assert small.path == snapshot / "config.json"
    assert small.path.read_text() == '{"a": 1}'
    assert large.path == snapshot / WEIGHTS
    assert large.path.read_bytes() == weights()
    assert large.answer == {"path": str(large.path), "revision": commit, "filename": WEIGHTS}
    assert large.path.resolve() == client.blobs / hashlib.sha256(weights()).hexdigest()
    assert (client.home / "hub" / "models--acme--model" / "refs" / "main").read_text() == commit
    assert sorted(path.name for path in client.blobs.iterdir()) == sorted(
        [large.path.resolve().name, small.path.resolve().name]
    )
    assert small.stderr == large.stderr == ""


def test_second_fetch_downloads_nothing(client: Client, hub: LoopbackHub) -> None:
    """A second export costs one request per file, and none if the commit is given."""
    first = client.fetch()
    hub.forget_requests()
    assert client.fetch().path == first.path
    assert [request.method for request in hub.requests] == ["HEAD"]
    hub.forget_requests()
    assert client.fetch(revision=hub.commit(REPO)).path == first.path
    assert hub.requests == []


def test_revision_may_be_a_commit(client: Client, hub: LoopbackHub) -> None:
    """Bundles name the commit that they were made from; it must lead back to the same files."""
    outcome = client.fetch(revision=hub.commit(REPO))
    assert outcome.answer is not None
    assert outcome.answer["revision"] == hub.commit(REPO)


def test_unchanged_file_of_a_new_commit_is_not_downloaded_again(client: Client, hub: LoopbackHub) -> None:
    """A commit to the model card must not cost users the weights a second time."""
    old = client.fetch()
    (hub.root / REPO / "README.md").write_text("new")
    hub.forget_requests()
    new = client.fetch()
    assert new.path != old.path
    assert new.path.read_bytes() == weights()
    assert file_requests(hub) == []


def test_fetch_optional_tells_a_missing_file_from_a_missing_repository(client: Client) -> None:
    """Callers try one file name after another: only a missing file may lead them on."""
    assert client.fetch("config.json", call="fetch_optional").path.is_file()
    missing = client.fetch("other.json", call="fetch_optional")
    assert missing.answer is None
    assert missing.error is None
    client.fetch("x.json", call="fetch_optional", repo_id="acme/none", HF_TOKEN="hf_loopback").fails(
        "DownloadError", "acme/none"
    )


@pytest.mark.parametrize("reset", [False, True], ids=["ended", "reset"])
def test_lost_connection_is_resumed_in_the_same_process(client: Client, hub: LoopbackHub, reset: bool) -> None:
    """A short loss of the network costs the bytes under way, not the bytes that had arrived."""
    hub.cut_after(WEIGHTS, SIZE // 2, reset=reset)
    outcome = client.fetch(with_progress=True)
    assert outcome.path.read_bytes() == weights()
    first, second = file_requests(hub)
    assert first.range is None
    assert second.range == f"bytes={SIZE // 2}-"
    assert hub.bytes_sent(WEIGHTS) == SIZE
    assert_progress_adds_up(outcome.events)


def assert_progress_adds_up(events: list[list[Any]]) -> None:
    """Every round starts at zero of the whole size and ends; the last one is complete."""
    assert events[0] == ["start", WEIGHTS, SIZE]
    assert events[-1] == ["finish"]
    last = max(i for i, event in enumerate(events) if event[0] == "start")
    assert sum(event[1] for event in events[last:] if event[0] == "advance") == SIZE
    assert [event[0] for event in events if event[0] != "advance"] in (
        ["start", "finish"],
        ["start", "finish", "start", "finish"],
    )


def test_xet_reports_progress_as_one_bar() -> None:
    """Most files of the real Hub come through hf_xet, whose reporter asks more of a bar than plain HTTP does."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    from hypersd.engines.hub import _bar_class

    events: list[Any] = []
    progress = SimpleNamespace(
        start=lambda filename, total: events.append(("start", filename, total)),
        advance=lambda n: events.append(("advance", n)),
        finish=lambda: events.append(("finish",)),
    )
    for told in (progress, None):
        with XetDownloadProgressReporter(
            reconstruction_desc="", total=8, log_level=30, name="xet", tqdm_class=_bar_class("x.bin", told)
        ) as reporter:
            for done in (3, 8):
                report = SimpleNamespace(
                    total_bytes=8,
                    total_bytes_completed=done,
                    total_transfer_bytes_completed=done,
                    total_bytes_completion_rate=1.0,
                    total_transfer_bytes_completion_rate=1.0,
                )
                reporter.update_progress(report)
    assert events == [("start", "x.bin", 8), ("advance", 3), ("advance", 5), ("finish",)]


def test_killed_download_resumes_in_the_next_process(client: Client, hub: LoopbackHub) -> None:
    """Ctrl-C, a kill or a power cut in the middle of 10 GB must not cost the whole of it again.

    The last bytes before the kill are few: a buffer that waits for more would lose them.
    """
    had = SIZE // 2 + 100
    hub.stall_after(WEIGHTS, had)
    process = client.start()
    wait_until(lambda: client.partial.exists() and client.partial.stat().st_size >= had)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert client.partial.stat().st_size == had
    hub.forget_requests()
    outcome = client.fetch(with_progress=True)
    assert outcome.path.read_bytes() == weights()
    assert [(request.range, request.status, request.sent) for request in file_requests(hub)] == [
        (f"bytes={had}-", 206, SIZE - had)
    ]
    assert not client.partial.exists()
    assert_progress_adds_up(outcome.events)
    assert outcome.events[1] == ["advance", had]


def test_two_processes_share_one_download(client: Client, hub: LoopbackHub) -> None:
    """Two exports started together must not write into the same partial file."""
    processes = [client.start() for _ in range(2)]
    outcomes = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [outcome["error"] for outcome in outcomes] == [None, None]
    assert hub.bytes_sent(WEIGHTS) == SIZE


@pytest.mark.parametrize("size", [SIZE // 2, SIZE, SIZE + 1], ids=["half", "whole", "too long"])
def test_damaged_partial_is_found_out(client: Client, hub: LoopbackHub, size: int) -> None:
    """A crash may leave garbage on the disk: it must not become weights, and the next run must recover."""
    client.partial.parent.mkdir(parents=True)
    client.partial.write_bytes(b"\0" * size)
    client.fetch().fails("DownloadError", WEIGHTS, "SHA-256", "run the command again")
    assert list(client.blobs.iterdir()) == []
    assert client.fetch().path.read_bytes() == weights()


def test_no_room_on_the_disk(client: Client, hub: LoopbackHub) -> None:
    """A disk too small is said before hours of download, and a disk that fills up is not a crash."""
    before = "import shutil; shutil.disk_usage = lambda path: SimpleNamespace(free=1000)"
    client.fetch(before=before).fails("DiskFullError", "0.0 GB free", "HF_HOME")
    assert file_requests(hub) == []
    before = """
import errno
from pathlib import Path
real = Path.open
def full(path, mode="r", *arguments, **options):
    if "a" in mode:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(path, mode, *arguments, **options)
Path.open = full
"""
    client.fetch(before=before).fails("DiskFullError", WEIGHTS, "is full", "HF_HOME")


def test_gated_repository(client: Client, hub: LoopbackHub) -> None:
    """A user who has not accepted a licence is told where to; the token goes to the Hub and to no other host."""
    hub.gated.add(REPO)
    error = client.fetch().fails("DownloadError", REPO, "401", "licence", f"{hub.url}/{REPO}", "HF_TOKEN")
    assert error["exit_code"] == 2
    assert error["cause"]
    client.fetch("config.json", call="fetch_optional").fails("DownloadError", REPO, "401")
    client.fetch(HF_TOKEN="hf_wrong").fails("DownloadError", REPO, "401", "HF_TOKEN")
    hub.forget_requests()
    assert client.fetch(HF_TOKEN=hub.token).path.read_bytes() == weights()
    assert {(request.cdn, request.authorized) for request in hub.requests} == {(False, True), (True, False)}


def test_forbidden(client: Client, hub: LoopbackHub) -> None:
    """A token without the right to read the repository answers 403."""
    hub.fail_with(403, times=10)
    client.fetch().fails("DownloadError", REPO, "403", "HF_TOKEN")


def test_names_that_do_not_exist(client: Client, hub: LoopbackHub) -> None:
    """A slip of the keyboard is answered with the name that was wrong."""
    # As the real Hub does: 401 to who is not logged in, 404 to who is.
    client.fetch(repo_id="acme/none").fails("DownloadError", "acme/none", "401", "check the name")
    client.fetch(repo_id="acme/none", HF_TOKEN=hub.token).fails("DownloadError", "acme/none", "404", "check the name")
    client.fetch(revision="v9").fails("DownloadError", REPO, "'v9'", "branch")
    client.fetch("no.bin").fails("DownloadError", REPO, "'no.bin'", "'main'")


@pytest.mark.parametrize("repo_id", ["a/b/c", "./weights", "", "a--b", "/data/sdxl"])
def test_malformed_repository(client: Client, repo_id: str) -> None:
    """Most often a local path with a slip in it, so the message speaks of paths, too."""
    client.fetch(repo_id=repo_id).fails("DownloadError", repr(repo_id), "local path")


def test_malformed_file_name(client: Client) -> None:
    """A file name cannot lead out of the cache."""
    client.fetch("../../x").fails("DownloadError", "..")


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_no_network(client: Client) -> None:
    """No network is told at once and names the ways out; it is never mistaken for a missing file."""
    endpoint = closed_port()
    for call in ("fetch", "fetch_optional"):
        error = client.fetch(call=call, HF_ENDPOINT=endpoint).fails(
            "NetworkError", endpoint, "check the connection", "HF_ENDPOINT", "local files"
        )
        assert error["exit_code"] == 1


def test_no_network_with_a_cache(client: Client) -> None:
    """Downloaded files, and the Hub's earlier answers about missing ones, are enough to work without it."""
    here = client.fetch("config.json")
    client.fetch("other.json", call="fetch_optional")
    endpoint = closed_port()
    assert client.fetch("config.json", HF_ENDPOINT=endpoint).path == here.path
    assert client.fetch("other.json", call="fetch_optional", HF_ENDPOINT=endpoint).error is None
    client.fetch("third.json", call="fetch_optional", HF_ENDPOINT=endpoint).fails("NetworkError", endpoint)


def test_endpoint_without_scheme(client: Client) -> None:
    """A mirror is easily given without https://."""
    client.fetch(HF_ENDPOINT="mirror.invalid").fails("NetworkError", "mirror.invalid", "http://", "HF_ENDPOINT")


def test_endpoint_that_is_no_hub(client: Client, tmp_path: Path) -> None:
    """A login page of a hotel's network answers 200 to everything."""
    script = (
        "import http.server as s; s.test(s.SimpleHTTPRequestHandler, s.ThreadingHTTPServer, port=0, bind='127.0.0.1')"
    )
    folder = tmp_path / "site" / REPO / "resolve" / "main"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("welcome")
    with subprocess.Popen(
        [sys.executable, "-u", "-c", script], cwd=tmp_path / "site", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as site:
        assert site.stdout is not None
        port = site.stdout.readline().split()[5].decode()
        try:
            client.fetch("config.json", HF_ENDPOINT=f"http://127.0.0.1:{port}").fails(
                "DownloadError", port, "config.json", "HF_ENDPOINT"
            )
        finally:
            site.terminate()


def test_hub_in_trouble(client: Client, hub: LoopbackHub) -> None:
    """A short outage is waited out; a long one is the Hub's fault and not the user's."""
    hub.fail_with(503, times=3)
    assert client.fetch().path.read_bytes() == weights()
    hub.fail_with(503, times=100)
    error = client.fetch("config.json").fails("NetworkError", hub.url, "503", "try again later")
    assert error["exit_code"] == 1


def test_trouble_in_the_middle_of_a_download(client: Client, hub: LoopbackHub) -> None:
    """A download that cannot be finished now keeps what it has."""
    hub.cut_after(WEIGHTS, SIZE // 2)
    hub.cut_after(WEIGHTS, 0, times=20)
    client.fetch().fails("NetworkError", WEIGHTS, "check the connection")
    assert client.partial.stat().st_size == SIZE // 2


def test_offline(client: Client, hub: LoopbackHub) -> None:
    """HF_HUB_OFFLINE asks nobody: the cache alone decides what there is."""
    client.fetch(HF_HUB_OFFLINE="1").fails("NetworkError", WEIGHTS, "HF_HUB_OFFLINE", str(client.home))
    client.fetch(call="fetch_optional", HF_HUB_OFFLINE="1").fails("NetworkError", "HF_HUB_OFFLINE")
    here = client.fetch("config.json")
    hub.forget_requests()
    assert client.fetch("config.json", HF_HUB_OFFLINE="1").path == here.path
    absent = client.fetch(call="fetch_optional", HF_HUB_OFFLINE="1")
    assert absent.answer is None
    assert absent.error is None
    client.fetch(call="fetch_optional", revision="v2", HF_HUB_OFFLINE="1").fails("NetworkError", "'v2'")
    assert hub.requests == []


def test_cache_that_is_no_folder(client: Client) -> None:
    """A cache that cannot be written, as another user's on a shared machine, in a way that stops root, too."""
    client.home.write_text("a file")
    client.fetch().fails("DownloadError", str(client.home), "HF_HOME")
    client.fetch("config.json").fails("DownloadError", str(client.home), "HF_HOME")


def test_the_library_lists_and_downloads_a_whole_repository(client: Client, hub: LoopbackHub) -> None:
    """The loopback Hub is near enough to the real one for what diffusers and transformers ask of it."""
    code = f"""
from huggingface_hub import HfApi, snapshot_download
info = HfApi().model_info({REPO!r}, revision={hub.commit(REPO)!r})
print(info.sha, *sorted(sibling.rfilename for sibling in info.siblings))
print(snapshot_download({REPO!r}))
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **hub.environment(client.home)},
        capture_output=True,
        text=True,
        check=True,
    )
    listing, folder = process.stdout.splitlines()
    assert listing.split() == [hub.commit(REPO), "config.json", WEIGHTS]
    assert (Path(folder) / WEIGHTS).read_bytes() == weights()


def test_the_loopback_hub_is_a_program(hub: LoopbackHub) -> None:
    """For trying the command line by hand."""
    script = Path(__file__).parents[1] / "loopback_hub.py"
    with subprocess.Popen(
        [sys.executable, script, hub.root, "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline().startswith("HF_ENDPOINT=http://127.0.0.1:")
        program.send_signal(signal.SIGINT)
        assert program.wait(timeout=20) == 0
