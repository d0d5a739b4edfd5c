"""Checks before a request is parsed: token, size, time and origin; and the number of connections."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import requests
import starlette
from serve_sockets import answer, dial, error_of, exchange, head, statuses, until_closed, whole
from stand_in_service import GENERATIONS, LONG, GatedPipeline, RunningServer, wait_until
from starlette.types import Message
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from hypersd.serve import guard, server
from hypersd.serve.metrics import Metrics
from hypersd.serve.settings import ServeSettings

TOKEN = "sesame"
BODY = json.dumps({"prompt": "a cat"}).encode()


# The token


@pytest.fixture
def locked(gated: GatedPipeline, start_server) -> RunningServer:
    return start_server(gated, token=TOKEN)


@pytest.mark.parametrize("path", ["/v1/models", GENERATIONS, "/metrics", "/%76%31/models", "/v1/nothing"])
@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", "Bearer sesam", f"Basic {TOKEN}", TOKEN, "Bearer s\xe9same"]
)
def test_without_the_token(path: str, header: str | None, locked: RunningServer) -> None:
    headers = {} if header is None else {"Authorization": header}
    status, names, body = exchange(locked.address, head(path, "GET", **headers))
    assert status == 401
    assert names["www-authenticate"] == "Bearer"
    assert error_of(body)["type"] == "authentication_error"
    assert error_of(body)["code"] == "invalid_api_key"
    assert TOKEN.encode() not in body


def test_with_the_token(locked: RunningServer) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} {TOKEN}"}
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(locked.url + path, headers=headers, timeout=LONG).status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/openapi.json", "/static/live.js"])
def test_paths_that_need_no_token(path: str, locked: RunningServer) -> None:
    assert httpx.get(locked.url + path, timeout=LONG).status_code == 200


def test_a_body_without_the_token_is_not_read(locked: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes before the body, and the connection does not wait for it."""
    monkeypatch.setattr(guard, "SILENCE_SECONDS", 0.1)
    with dial(locked.address) as connection:
        connection.sendall(head(Content_Length=1000))
        status, headers, _ = answer(connection)
        assert (status, headers["connection"]) == (401, "close")
        assert until_closed(connection) == b""


def subprotocols(token: bytes | None) -> list[Subprotocol]:
    """The subprotocols that the page offers."""
    own = [] if token is None else ["bearer." + base64.urlsafe_b64encode(token).decode().rstrip("=")]
    return [Subprotocol(name) for name in ("hypersd.live", *own)]


@pytest.mark.parametrize("token", [None, b"", b"wrong", b"\xff\xfe"])
def test_a_live_connection_without_the_token(token: bytes | None, locked: RunningServer) -> None:
    with pytest.raises(InvalidStatus) as raised:
        connect(locked.live_url, subprotocols=subprotocols(token))
    assert raised.value.response.status_code == 403


def test_a_live_connection_with_the_token(locked: RunningServer) -> None:
    """By the subprotocol, which is what browsers can send, or the header. The answer does not repeat it."""
    with connect(locked.live_url, subprotocols=subprotocols(TOKEN.encode())) as live:
        assert live.subprotocol == "hypersd.live"
    with connect(locked.live_url, additional_headers={"Authorization": f"Bearer {TOKEN}"}):
        pass


def test_tokens_are_compared_in_constant_time(locked: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((given, expected))
        return False

    monkeypatch.setattr(guard.secrets, "compare_digest", compare)
    answer = httpx.get(locked.url + "/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=LONG)
    assert answer.status_code == 401
    assert compared == [(TOKEN.encode(), TOKEN.encode())]


# Size and time


def test_a_length_that_is_too_large_is_rejected_before_the_body(demo_server: RunningServer) -> None:
    with dial(demo_server.address) as connection:
        connection.sendall(head(Content_Length=10 << 20))
        status, headers, body = answer(connection)
    assert (status, headers["connection"]) == (413, "close")
    assert error_of(body)["code"] == "request_too_large"


@pytest.mark.parametrize("length", ["1" * 30, "1" * 5000])
def test_lengths_of_many_digits(length: str, demo_server: RunningServer) -> None:
    status, _, _ = exchange(demo_server.address, head(Content_Length=length))
    assert status in (400, 413)


def test_a_body_without_a_length_is_counted(demo_server: RunningServer) -> None:
    """No more of it than the limit is kept."""
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    with dial(demo_server.address) as connection:
        connection.sendall(head(Transfer_Encoding="chunked"))
        for _ in range(17):
            connection.sendall(chunk)
        status, headers, body = answer(connection)
    assert (status, headers["connection"]) == (413, "close")
    assert "more than 1048576 bytes" in error_of(body)["message"]


def by_httpx(url: str, body: bytes) -> tuple[int, bytes]:
    answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=LONG)
    return answer.status_code, answer.content


def by_requests(url: str, body: bytes) -> tuple[int, bytes]:
    answer = requests.post(url, data=body, headers={"Content-Type": "application/json"}, timeout=LONG)
    return answer.status_code, answer.content


def by_requests_in_chunks(url: str, body: bytes) -> tuple[int, bytes]:
    """Without a length: the limit is met in the middle."""
    answer = requests.post(url, data=iter([body]), headers={"Content-Type": "application/json"}, timeout=LONG)
    return answer.status_code, answer.content


def by_urllib(url: str, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=LONG)
    return raised.value.code, raised.value.read()


@pytest.mark.parametrize("post", [by_httpx, by_requests, by_requests_in_chunks, by_urllib])
@pytest.mark.parametrize("size", [2 << 20, 12 << 20])
def test_clients_that_send_first_and_read_later_learn_why(post: Any, size: int, demo_server: RunningServer) -> None:
    """Most do: a connection that is simply closed under them tells them nothing."""
    status, body = post(demo_server.url + GENERATIONS, json.dumps({"prompt": "x" * size}).encode())
    assert status == 413
    assert error_of(body)["message"] == "the body has more than 1048576 bytes: send smaller images"


def test_a_client_without_the_token_learns_why_too(locked: RunningServer) -> None:
    assert by_urllib(locked.url + GENERATIONS, bytes(12 << 20))[0] == 401


def test_a_rejected_body_is_not_read_for_ever(
    gated: GatedPipeline, start_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only so many bytes of it, and only while they come; each byte alone would keep it alive for ever."""
    running = start_server(gated, max_body=1000, body_timeout=0.5)
    with dial(running.address) as many, dial(running.address) as slow:
        many.sendall(head(Content_Length=10 << 30))
        assert answer(many)[0] == 413
        with pytest.raises(ConnectionError):
            while True:
                many.sendall(bytes(1 << 20))
        slow.sendall(head(Content_Length=10 << 30))
        assert answer(slow)[0] == 413
        with pytest.raises(ConnectionError):
            while True:
                slow.sendall(b"x")
                time.sleep(0.02)
    monkeypatch.setattr(guard, "SILENCE_SECONDS", 0.1)
    with dial(running.address) as silent:
        silent.sendall(head(Content_Length=10 << 30))
        assert answer(silent)[0] == 413
        assert until_closed(silent) == b""


def test_bytes_in_the_last_moment_do_not_extend_the_time_of_a_rejected_body() -> None:
    """They arrive in the very turn of the event loop in which the time is over."""
    received = []

    async def receive() -> Message:
        received.append(b"x")
        assert len(received) < 4, "it is still read"
        await asyncio.sleep(0.4)
        return {"type": "http.request", "body": received[-1], "more_body": True}

    async def request() -> None:
        rejecting = guard.Guard(no_app, ServeSettings(max_body=1000, body_timeout=0.5), Metrics(), ())
        asyncio.get_running_loop().call_later(0.3, time.sleep, 0.4)  # after that both are due: the bytes and the end
        await rejecting({"type": "http", "path": "/", "headers": [(b"content-length", b"1001")]}, receive, no_send)

    async def no_app(*_: object) -> None:
        raise AssertionError("the request was rejected")

    async def no_send(_: Message) -> None:
        pass

    asyncio.run(request())


def test_chunks_make_a_body(demo_server: RunningServer) -> None:
    answer = httpx.post(
        demo_server.url + GENERATIONS,
        content=iter([BODY[:5], BODY[5:]]),
        headers={"Content-Type": "application/json"},
        timeout=LONG,
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("sent", [b"", b'{"prompt"'])
def test_a_body_that_does_not_come(sent: bytes, gated: GatedPipeline, start_server) -> None:
    """Others are answered meanwhile."""
    running = start_server(gated, body_timeout=0.2)
    with dial(running.address) as connection:
        connection.sendall(head(Content_Length=100) + sent)
        assert httpx.get(running.url + "/readyz", timeout=LONG).status_code == 200
        status, headers, body = answer(connection)
    assert (status, headers["connection"]) == (408, "close")
    assert error_of(body)["message"] == "the body did not arrive within 0.2 s: send it faster"
    assert gated.calls == []


@pytest.fixture
def impatient(gated: GatedPipeline, start_server, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
    return start_server(gated)


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: 127", b"POST / HTTP/1.1\r\nA: b\r\n"])
def test_a_request_that_does_not_begin(sent: bytes, impatient: RunningServer) -> None:
    with dial(impatient.address) as connection:
        connection.sendall(sent)
        assert until_closed(connection) == b""


def test_a_second_request_that_does_not_begin(impatient: RunningServer) -> None:
    """A byte of it must not buy all the time there is."""
    with dial(impatient.address) as connection:
        connection.sendall(head("/healthz", "GET"))
        assert answer(connection)[0] == 200
        connection.sendall(b"GET /healthz HT")
        assert until_closed(connection) == b""


def test_patience_with_what_has_begun(gated: GatedPipeline, start_server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends neither a request, nor a live connection, nor the pause between two requests."""
    monkeypatch.setattr(server, "HEADER_SECONDS", 1.5)
    running = start_server(gated)
    gated.gate.clear()
    with dial(running.address) as busy, dial(running.address) as pausing, connect(running.live_url) as live:
        busy.sendall(whole(BODY))
        pausing.sendall(head("/healthz", "GET"))
        assert answer(pausing)[0] == 200
        with dial(running.address) as silent:
            assert until_closed(silent) == b"", "no younger connection has been closed, so that the others' time is up"
        pausing.sendall(head("/healthz", "GET"))
        assert answer(pausing)[0] == 200
        gated.gate.set()
        assert answer(busy)[0] == 200
        live.send(json.dumps({"id": 1, "prompt": ""}))
        assert isinstance(live.recv(LONG), bytes)


# Many at once


def test_two_hundred_at_once_are_all_answered(gated: GatedPipeline, start_server) -> None:
    """Each is answered once while one image is under way: with an image, or that the queue is full."""
    running = start_server(gated, queue=64)
    gated.gate.clear()
    connections = [dial(running.address) for _ in range(200)]
    for i, connection in enumerate(connections):
        connection.sendall(whole(json.dumps({"prompt": str(i), "seed": i}).encode()))
    wait_until(lambda: gated.calls)
    rejected = running.service.metrics.registry
    full = {"reason": "queue_full"}
    wait_until(lambda: rejected.get_sample_value("hypersd_rejected_total", full) == 200 - len(gated.calls[0]) - 64)
    gated.gate.set()
    answers = [answer(connection) for connection in connections]
    for connection in connections:
        connection.close()
    seeds = [json.loads(body)["data"][0]["seed"] for status, _, body in answers if status == 200]
    assert {status for status, _, _ in answers} == {200, 503}
    assert sorted(map(str, seeds)) == sorted(gated.prompts)
    assert len(seeds) == len(gated.calls[0]) + 64
    assert all(int(headers["retry-after"]) >= 1 for status, headers, _ in answers if status == 503)


# Origins


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1.example.com", "localhost.example.com:80", "", "a b"])
@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/"])
def test_other_names_for_this_machine_are_rejected(host: str, path: str, demo_server: RunningServer) -> None:
    """Else any page could let a name of its own point here, and read what the service answers."""
    status, _, body = exchange(demo_server.address, head(path, "GET", Host=host))
    assert status == 400
    assert b"127.0.0.1" not in body or b"localhost" in body


IGNORES_CASE = tuple(map(int, starlette.__version__.split(".")[:2])) >= (1, 9)  # which needs Python 3.11
LOOPBACKS = ["127.0.0.1", "localhost", "localhost:8000", "[::1]", "[::1]:8000", *["LOCALHOST:8000"] * IGNORES_CASE]


@pytest.mark.parametrize("host", LOOPBACKS)
def test_the_loopbacks_names(host: str, demo_server: RunningServer) -> None:
    assert exchange(demo_server.address, head("/healthz", "GET", Host=host))[0] == 200


def test_a_live_connection_to_another_name(demo_server: RunningServer) -> None:
    with pytest.raises(InvalidStatus) as raised, socket.create_connection(demo_server.address) as own:
        connect(demo_server.live_url.replace("127.0.0.1", "example.com"), sock=own)
    assert raised.value.response.status_code in (400, 403)


@pytest.mark.parametrize("origin", ["http://example.com", "null", "http://127.0.0.1", "http://localhost:1"])
def test_pages_of_other_sites_open_no_live_connection(origin: str, demo_server: RunningServer) -> None:
    with pytest.raises(InvalidStatus) as raised:
        connect(demo_server.live_url, origin=Origin(origin))
    assert raised.value.response.status_code == 403


def test_the_own_page_opens_one(demo_server: RunningServer) -> None:
    with connect(demo_server.live_url, origin=Origin(demo_server.url)):
        pass


def test_pages_of_other_sites_cannot_post_without_asking(demo_server: RunningServer) -> None:
    """A browser sends text/plain without asking first; it is not taken. And what it asks first is not granted."""
    status, headers, _ = exchange(demo_server.address, whole(BODY, Content_Type="text/plain", Origin="http://a.b"))
    assert status == 400
    asked: dict[str, Any] = {"Origin": "http://a.b", "Access_Control_Request_Method": "POST"}
    status, headers, _ = exchange(demo_server.address, head(method="OPTIONS", **asked))
    assert status == 405
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../guard.py",
        "/static/..%2fguard.py",
        "/static/%2e%2e/guard.py",
        "/static/....//guard.py",
        "/static//etc/passwd",
        "/static/%2fetc/passwd",
        "/static/..\\guard.py",
        "/static/live.js%00",
        "/static/" + "a" * 5000,
        "/static/",
        "/../../../etc/passwd",
    ],
)
def test_only_the_pages_own_files_are_served(path: str, demo_server: RunningServer) -> None:
    status, _, body = exchange(demo_server.address, head(path, "GET"))
    assert status in (400, 404), body


def test_requests_that_are_sent_before_the_answer(demo_server: RunningServer) -> None:
    """Pipelined: answered in order."""
    with dial(demo_server.address) as connection:
        connection.sendall(whole(BODY) + whole(b"{") + head("/healthz", "GET", Connection="close"))
        assert statuses(until_closed(connection)) == [200, 400, 200]


def test_concurrent_requests_get_their_own_images(demo_server: RunningServer, demo_pipe) -> None:
    def seed_and_image(seed: int) -> tuple[int, bytes]:
        body = {"prompt": "a red circle", "seed": seed}
        answer = httpx.post(demo_server.url + GENERATIONS, json=body, headers={"Accept": "image/png"}, timeout=LONG)
        return int(answer.headers["x-hypersd-seed"]), answer.content

    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(seed_and_image, range(24)))
    assert [seed for seed, _ in images] == list(range(24))
    assert len({file for _, file in images}) == 24
    assert images[3] == seed_and_image(3)
