"""The WebSocket: frames that can be read, the newest input wins, and nothing a client sends ends the service."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from stand_in_service import LONG, GatedPipeline, RunningServer, StandInService, file_of, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from hypersd.serve.settings import ServeSettings

PROMPT = "a red circle and a blue square"


def open_live(server: RunningServer, **options: Any) -> ClientConnection:
    return connect(server.live_url, subprotocols=[Subprotocol("hypersd.live")], max_size=None, **options)


@pytest.fixture
def live(demo_server: RunningServer) -> Iterator[ClientConnection]:
    with open_live(demo_server) as connection:
        yield connection


def ask(connection: ClientConnection, number: int, **body: Any) -> None:
    connection.send(json.dumps({"id": number, "prompt": PROMPT, **body}))


def image(connection: ClientConnection) -> tuple[dict[str, Any], bytes]:
    """The next frame's header and file."""
    frame = connection.recv(LONG)
    assert isinstance(frame, bytes), frame
    (length,) = struct.unpack_from(">I", frame)
    return json.loads(frame[4 : 4 + length]), frame[4 + length :]


def framed(body: dict[str, Any], file: bytes = b"") -> bytes:
    """An input and its init image, framed as the server frames its images."""
    header = json.dumps(body).encode()
    return struct.pack(">I", len(header)) + header + file


def problem(connection: ClientConnection) -> dict[str, Any]:
    frame = connection.recv(LONG)
    assert isinstance(frame, str)
    return json.loads(frame)


def superseded(server: RunningServer) -> float:
    """The number of inputs and images that were dropped for a newer one."""
    figures = server.service.metrics.registry
    return figures.get_sample_value("hypersd_dropped_images_total", {"reason": "superseded"}) or 0.0


# Images


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_is_the_http_apis(kind: str, live: ClientConnection, demo_server: RunningServer) -> None:
    """To the byte."""
    body = {"prompt": PROMPT, "seed": 3, "steps": 2, "output_format": kind}
    ask(live, 7, **body)
    header, file = image(live)
    answer = httpx.post(
        demo_server.url + "/v1/images/generations", json=body, headers={"Accept": f"image/{kind}"}, timeout=LONG
    )
    assert file == answer.content
    assert header["timings"].keys() == json.loads(answer.headers["x-hypersd-timings"]).keys()
    assert header | {"timings": 0, "waited": 0} == {
        "id": 7,
        "index": 0,
        "count": 1,
        "seed": 3,
        "mime": f"image/{kind}",
        "width": 96,
        "height": 96,
        "steps": 2,
        "eta": 1.0,
        "model": "demo15-canny",
        "timings": 0,
        "waited": 0,
    }


def test_the_subprotocol_is_agreed_upon(live: ClientConnection, demo_server: RunningServer) -> None:
    assert live.subprotocol == "hypersd.live"
    with connect(demo_server.live_url) as plain:
        assert plain.subprotocol is None
        ask(plain, 0)
        assert image(plain)[0]["id"] == 0


def test_several_images_of_an_input(live: ClientConnection) -> None:
    ask(live, 1, n=3, seed=5)
    headers = [image(live)[0] for _ in range(3)]
    assert [(one["index"], one["count"], one["seed"]) for one in headers] == [(0, 3, 5), (1, 3, 6), (2, 3, 7)]


def test_control_images(live: ClientConnection, photo_base64: str) -> None:
    ask(live, 1, seed=5)
    ask_controlled = {"seed": 5, "control_image": photo_base64}
    free = image(live)[1]
    ask(live, 2, **ask_controlled)
    assert image(live)[1] != free


def test_a_frame_starts_from_its_image(live: ClientConnection, demo_server: RunningServer, photo) -> None:
    """As an edit over HTTP does, to the byte; with a mask, too."""
    mask = "data:image/png;base64," + base64.b64encode(file_of(photo)).decode()
    file = file_of(photo, "JPEG")
    for more in ({}, {"strength": 0.5}, {"mask": mask}):
        body = {"prompt": PROMPT, "seed": 3, "steps": 2, **more}
        live.send(framed({"id": 7, **body}, file))
        header, got = image(live)
        assert header["id"] == 7
        answer = httpx.post(
            demo_server.url + "/v1/images/edits",
            json={**body, "image": base64.b64encode(file).decode()},
            headers={"Accept": "image/png"},
            timeout=LONG,
        )
        assert got == answer.content


# The newest wins


def test_the_newest_frame_wins(gated: GatedPipeline, start_server, photo) -> None:
    """Frames of a camera do not queue: of thirty that come while an image is under way, the last is generated."""
    server, file = start_server(gated), file_of(photo, "JPEG")
    gated.gate.clear()
    with open_live(server) as live:
        live.send(framed({"id": 0, "prompt": "0"}, file))
        wait_until(lambda: gated.calls)
        for number in range(1, 31):
            live.send(framed({"id": number, "prompt": str(number)}, file))
        wait_until(lambda: superseded(server) == 29)
        gated.gate.set()
        assert [image(live)[0]["id"] for _ in range(2)] == [0, 30]
    assert gated.prompts == ["0", "30"]


def test_the_newest_input_wins(gated: GatedPipeline, start_server) -> None:
    """Of fifty that come while an image is under way, only the last is generated."""
    server = start_server(gated)
    gated.gate.clear()
    with open_live(server) as live:
        ask(live, 0, prompt="0")
        wait_until(lambda: gated.calls)
        for number in range(1, 51):
            ask(live, number, prompt=str(number))
        wait_until(lambda: superseded(server) == 49)
        gated.gate.set()
        assert [image(live)[0]["id"] for _ in range(2)] == [0, 50]
    assert gated.prompts == ["0", "50"]


def test_an_input_that_waits_for_the_device_is_superseded(gated: GatedPipeline, start_server) -> None:
    """Others keep the device busy: of the inputs typed meanwhile only the last is generated."""
    server = start_server(gated)
    gated.gate.clear()
    with open_live(server) as other, open_live(server) as live:
        ask(other, 0, prompt="other")
        wait_until(lambda: gated.calls)
        for number in range(1, 51):
            ask(live, number, prompt=str(number), n=1)
        wait_until(lambda: superseded(server) == 49)
        gated.gate.set()
        assert image(live)[0]["id"] == 50
        assert image(other)[0]["id"] == 0
    assert gated.prompts == ["other", "50"]


def test_connections_do_not_supersede_each_other(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated)
    gated.gate.clear()
    with open_live(server) as one, open_live(server) as two:
        ask(one, 0, prompt="one")
        wait_until(lambda: gated.calls)
        ask(two, 0, prompt="two")
        wait_until(lambda: len(server.service._jobs) == 1)
        gated.gate.set()
        assert image(one)[0]["id"] == image(two)[0]["id"] == 0
    assert gated.prompts == ["one", "two"]


# Failures


@pytest.mark.parametrize(
    ("text", "number", "param"),
    [
        ("", None, None),
        ("{", None, None),
        ("[]", None, None),
        ("null", None, None),
        ('"x"', None, None),
        ("[" * 100_000, None, None),
        ('{"id": 4}', 4, "prompt"),
        ('{"id": 4, "prompt": 3}', 4, "prompt"),
        ('{"id": 4, "prompt": "", "seed": NaN}', 4, "seed"),
        ('{"id": 4, "prompt": "", "eta": Infinity}', 4, "eta"),
        ('{"id": 4, "prompt": "", "eta": 1e400}', 4, "eta"),
        ('{"id": 4, "prompt": "", "seed": ' + "9" * 5000 + "}", None, None),
        ('{"id": 4, "prompt": "\\ud800"}', 4, None),
        ('{"id": 4, "prompt": "", "nothing": 1}', 4, "nothing"),
        ('{"id": 4, "prompt": "", "\\ud800": 1}', 4, None),
        ('{"id": true, "prompt": ""}', None, "id"),
        ('{"id": -1, "prompt": ""}', -1, "id"),
        ('{"id": 4, "prompt": "", "model": "none"}', 4, None),
        ('{"id": 4, "prompt": "", "model": "\\ud800"}', 4, None),
        ('{"id": 4, "prompt": "", "steps": 9}', 4, None),
        ('{"id": 4, "prompt": "", "control_image": "file:///etc/passwd"}', 4, None),
    ],
)
def test_bad_input_is_told_and_the_next_is_generated(
    text: str, number: int | None, param: str | None, live: ClientConnection
) -> None:
    live.send(text)
    answer = problem(live)
    assert answer["id"] == number
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert param is None or answer["error"]["param"] == param
    ask(live, 5)
    assert image(live)[0]["id"] == 5


def test_bad_input_is_told_in_the_http_apis_words(live: ClientConnection, demo_server: RunningServer) -> None:
    body = {"prompt": "", "nothing": 1}
    ask(live, 5, **body)
    expected = httpx.post(demo_server.url + "/v1/images/generations", json=body).json()["error"]
    assert problem(live)["error"] == expected
    assert expected["message"] == "'nothing' is not known: leave it out"


@pytest.mark.parametrize(
    ("frame", "number", "words"),
    [
        (b"", None, "a binary message: expected the length"),
        (b"\xff\x00", None, "a binary message: expected the length"),
        (b"\0\0\0\0", None, "a binary message: expected the length"),
        (struct.pack(">I", 2**32 - 1) + b"{}", None, "a binary message: expected the length"),
        (framed({"id": 4}), 4, "prompt is missing"),
        (struct.pack(">I", 2) + b"\xff\xfe", None, "the body is not valid JSON"),
        (framed({"id": 4, "prompt": ""}), 4, "image is empty"),
        (framed({"id": 4, "prompt": ""}, b"no image"), 4, "image is not an image"),
        (framed({"id": 4, "prompt": "", "image": "AAAA"}, b"x"), 4, "image comes twice"),
        (framed({"id": 4, "prompt": "", "strength": 2}, b"x"), 4, "strength: "),
    ],
)
def test_a_bad_frame_is_told(frame: bytes, number: int | None, words: str, live: ClientConnection) -> None:
    live.send(frame)
    answer = problem(live)
    assert answer["id"] == number
    assert answer["error"]["message"].startswith(words)
    ask(live, 5)
    assert image(live)[0]["id"] == 5


def test_a_message_that_is_too_large_ends_the_connection(demo_server: RunningServer) -> None:
    with open_live(demo_server) as live, pytest.raises(ConnectionClosed) as raised:
        live.send(json.dumps({"id": 1, "prompt": "x" * (10 << 20)}))
        live.recv(LONG)
    assert raised.value.rcvd is None or raised.value.rcvd.code == 1009
    assert httpx.get(demo_server.url + "/readyz").status_code == 200


def test_a_failing_engine_is_told(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated)

    def fail(prompts: list[str]) -> None:
        if prompts == ["bad"]:
            raise RuntimeError("kernel")

    gated.on_call = fail
    with open_live(server) as live:
        ask(live, 1, prompt="bad")
        answer = problem(live)
        assert (answer["id"], answer["error"]["code"]) == (1, "engine_failed")
        ask(live, 2)
        assert image(live)[0]["id"] == 2


def test_a_full_queue_is_told(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated, queue=1)
    gated.gate.clear()
    with open_live(server) as one, open_live(server) as two, open_live(server) as three:
        ask(one, 1)
        wait_until(lambda: gated.calls)
        ask(two, 1)
        wait_until(lambda: len(server.service._jobs) == 1)
        ask(three, 1)
        answer = problem(three)
        assert (answer["id"], answer["error"]["code"]) == (1, "queue_full")
        gated.gate.set()
        ask(three, 2)
        assert image(three)[0]["id"] == 2


def test_no_image_is_generated_for_a_closed_connection(gated: GatedPipeline, start_server) -> None:
    """Without a farewell: the socket is closed."""
    server = start_server(gated)
    gated.gate.clear()
    with open_live(server) as stays:
        ask(stays, 1, prompt="first")
        wait_until(lambda: gated.calls)
        goes = open_live(server)
        ask(goes, 1, prompt="gone")
        wait_until(lambda: len(server.service._jobs) == 1)
        goes.socket.close()
        wait_until(lambda: len(server.service._jobs) == 0)
        gated.gate.set()
        assert image(stays)[0]["id"] == 1
    assert gated.prompts == ["first"]
    wait_until(lambda: server.service.metrics.registry.get_sample_value("hypersd_live_connections") == 0)


def test_there_are_only_so_many(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated, max_live=1)
    with open_live(server) as first:
        ask(first, 1)
        image(first)
        with open_live(server) as second, pytest.raises(ConnectionClosed) as raised:
            second.recv(LONG)
        assert raised.value.rcvd is not None
        assert raised.value.rcvd.code == 1013
        ask(first, 2)
        assert image(first)[0]["id"] == 2


def test_the_end_is_told(demo_canny_bundle, gated: GatedPipeline) -> None:
    """By the close code for a restart, even while an image is under way."""
    service = StandInService(demo_canny_bundle, gated)
    with RunningServer(service, ServeSettings()) as server:
        service.wait_ready()
        with open_live(server) as idle, open_live(server) as busy:
            gated.gate.clear()
            ask(busy, 1)
            wait_until(lambda: gated.calls)
            server.end()
            for connection in (idle, busy):
                with pytest.raises(ConnectionClosed) as raised:
                    connection.recv(LONG)
                assert raised.value.rcvd is not None
                assert raised.value.rcvd.code == 1012
            gated.gate.set()
        server.wait_ended()
