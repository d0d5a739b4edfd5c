"""Wrong and hostile requests: each gets an error that says what was wrong, and the service keeps running."""

from __future__ import annotations

import base64
import gzip
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from serve_sockets import answer, dial, error_of, exchange, head, until_closed, whole
from stand_in_service import GENERATIONS, LONG, GatedPipeline, RunningServer, StandInService, file_of, wait_until

from hypersd.serve.image_codec import decode_image
from hypersd.serve.settings import ServeSettings

BODY = json.dumps({"prompt": "a cat"}).encode()


@pytest.fixture(autouse=True)
def alive(demo_server: RunningServer) -> Iterator[None]:
    """After each test here the service is ready."""
    yield
    assert httpx.get(demo_server.url + "/readyz", timeout=LONG).status_code == 200


@pytest.fixture(autouse=True, scope="module")
def still_generates(demo_server: RunningServer) -> Iterator[None]:
    """After all of them the service generates."""
    yield
    assert exchange(demo_server.address, whole(BODY))[0] == 200


def rejected(server: RunningServer, body: bytes, **headers: Any) -> str:
    """The message of the 400 that a body gets: one line."""
    status, _, answered = exchange(server.address, whole(body, **headers))
    assert status == 400, answered
    error = error_of(answered)
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    return error["message"]


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "a cat"',
        b'{"prompt": "a cat",}',
        b"{'prompt': 'a cat'}",
        b"[]",
        b"null",
        b'"a cat"',
        b"prompt=a+cat",
        b"\xff\xfe\x00",
        b'{"prompt": "\xff"}',
        b"\x00" * 100,
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
        b'{"prompt": "", "control_image": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "", "negative_prompt": "\\udfff"}',
        b'{"prompt": "", "\\ud800": 1}',
        b'{"prompt": "", "control_image": {"\\ud800": ""}}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bodies_that_are_no_requests(body: bytes, demo_server: RunningServer) -> None:
    rejected(demo_server, body)


@pytest.mark.parametrize(
    "field", ["seed", "n", "steps", "eta", "guidance_scale", "control_scale", "output_compression"]
)
@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 4999, "-1", "1e5", "true", '"1"', "[1]", "{}"],
)
def test_values_that_are_not_numbers_in_range(field: str, value: str, demo_server: RunningServer) -> None:
    message = rejected(demo_server, f'{{"prompt": "", "control_image": "x", "{field}": {value}}}'.encode())
    assert "control_image" not in message


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_prompts_of_ten_megabytes(name: str, demo_server: RunningServer) -> None:
    answer = httpx.post(demo_server.url + GENERATIONS, json={"prompt": "", name: "x" * (10 << 20)}, timeout=LONG)
    assert answer.status_code == 413
    assert "characters" in rejected(demo_server, json.dumps({"prompt": "", name: "x" * 900_000}).encode())


@pytest.mark.parametrize(
    "prompt", ["", " ", "\0", "a\0b", "🎲" * 200, "\u202e\u0301" * 50, "x" * 200, "\r\n\t", "\uffff"]
)
@pytest.mark.filterwarnings("ignore::hypersd.runtime.text.TruncationWarning")
def test_unusual_prompts_are_accepted(prompt: str, demo_server: RunningServer) -> None:
    """The image's file holds them unchanged."""
    body = json.dumps({"prompt": prompt}).encode()
    status, _, file = exchange(demo_server.address, whole(body, Accept="image/png"))
    assert status == 200
    info = Image.open(io.BytesIO(file)).info
    assert json.loads(info["hypersd"])["prompt"] == prompt  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/png", "", "x"]
)
def test_other_content_types(kind: str, demo_server: RunningServer) -> None:
    rejected(demo_server, BODY, Content_Type=kind)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"])
def test_content_types_that_are_json(kind: str, demo_server: RunningServer) -> None:
    assert exchange(demo_server.address, whole(BODY, Content_Type=kind))[0] == 200


def test_compressed_bodies_are_not_unpacked(demo_server: RunningServer) -> None:
    """A few bytes could become many."""
    rejected(demo_server, gzip.compress(BODY), Content_Encoding="gzip")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        head(Content_Length="-1"),
        head(Content_Length="x"),
        head(Content_Length="1\r\nContent-Length: 2"),
        head(Transfer_Encoding="gzip"),
        head(Transfer_Encoding="chunked") + b"zz\r\n",
        head(Padding="x" * 100_000),
        head("/" + "x" * 100_000, "GET"),
        head("/%zz\x00", "GET"),
    ],
    ids=lambda request: repr(request[:40]),
)
def test_bytes_that_are_not_http(request_: bytes, demo_server: RunningServer) -> None:
    with dial(demo_server.address) as connection:
        connection.sendall(request_)
        said = connection.recv(1 << 16)
    assert said.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), said


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "CONNECT", "BREW"])
def test_other_methods(method: str, demo_server: RunningServer) -> None:
    with dial(demo_server.address) as connection:
        connection.sendall(head(method=method, Connection="close"))
        assert until_closed(connection).startswith(b"HTTP/1.1 405")


# Control images


def png(width: int, height: int, pixels: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit grey, whatever is true of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    middle = b"".join(chunk(*one) for one in more)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bomb(side: int, strips: int) -> bytes:
    """An image of much more memory than bytes: 20,000 by 20,000 grey pixels in 400 KB."""
    packer, strip = zlib.compressobj(9), bytes((side + 1) * side // strips)
    first, further = (packer.compress(strip) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return png(side, side, first + further * (strips - 1) + packer.flush())


def rows(width: int, height: int) -> bytes:
    return zlib.compress(bytes((width + 1) * height))


PHOTO = Image.radial_gradient("L").convert("RGB").resize((100, 80))
HOSTILE = {
    "nothing": b"",
    "text": b"a cat",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "svg with a png's name": b'<?xml version="1.0"?><!-- x.png --><svg/>',
    "gif": file_of(PHOTO, "GIF"),
    "tiff": file_of(PHOTO, "TIFF"),
    "bmp": file_of(PHOTO, "BMP"),
    "ppm": file_of(PHOTO, "PPM"),
    "icon": file_of(PHOTO, "ICO"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
    "half a png": file_of(PHOTO)[:-200],
    "a png's head": file_of(PHOTO)[:40],
    "half a jpeg": file_of(PHOTO, "JPEG")[:-500],
    "half a webp": file_of(PHOTO, "WEBP")[:-100],
    "a png of one pixel": png(1, 1, rows(1, 1)),
    "a png without a size": png(0, 0, b""),
    "a png that has fewer rows than it says": png(3000, 3000, rows(30, 30)),
    "a png of 2^31 pixels a side": png(2**31 - 1, 2**31 - 1, rows(8, 8)),
    "a png whose pixels are no zlib": png(32, 32, b"nonsense"),
    "a png of 34 megapixels": png(34_000, 1_000, rows(34_000, 1_000)),
    "a strip": png(8, 1_500_000, rows(8, 1_500_000)),
    "a png with a large text": png(32, 32, rows(32, 32), (b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20), 9))),
}


def with_image(field: str, text: str) -> bytes:
    """A body with an image in this field; a mask has an init image beside it."""
    beside = {"image": base64.b64encode(file_of(PHOTO)).decode()} if field == "mask" else {}
    return json.dumps({"prompt": "", **beside, field: text}).encode()


@pytest.mark.parametrize("field", ["control_image", "image", "mask"])
@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_not_images(name: str, field: str, demo_server: RunningServer) -> None:
    message = rejected(demo_server, with_image(field, base64.b64encode(HOSTILE[name]).decode()))
    assert message.startswith(field) or (name == "a strip" and "1500000" in message)


def test_a_bomb_is_rejected_before_it_is_unpacked(demo_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(20_000, 100)
    assert len(data) < 500_000
    loaded: list[object] = []
    monkeypatch.setattr("hypersd.serve.image_codec.to_rgb", loaded.append)
    text = base64.b64encode(data).decode()
    for field in ("control_image", "image"):
        assert "pixels" in rejected(demo_server, with_image(field, text))
    assert loaded == []


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd",
        "../../secret.png",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x.png",
        "https://example.com/x.png",
        "ftp://example.com/x.png",
        "data:image/png,abc",
        "data:image/svg+xml;base64,AAAA",
        "data:text/plain;base64,AAAA",
        "data:image/png;base64,file:///etc/passwd",
        "\\\\host\\share\\x.png",
        "C:\\x.png",
        "ä",
        "====",
        "A",
        " ",
    ],
)
def test_no_address_is_opened(text: str, demo_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither files nor sockets are, while such a text is read."""
    opened: list[Any] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        opened.append((event, arguments))

    for field in ("control_image", "image", "mask"):
        assert field in rejected(demo_server, with_image(field, text))
    monkeypatch.setattr("builtins.open", note)
    monkeypatch.setattr("socket.socket", note)
    with pytest.raises(Exception, match="control_image"):
        decode_image("control_image", text, 1 << 20)
    assert opened == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_valid_images(kind: str, mode: str, demo_server: RunningServer) -> None:
    text = base64.b64encode(file_of(PHOTO.convert(mode), kind)).decode()
    for field in ("control_image", "image", "mask"):
        assert exchange(demo_server.address, whole(with_image(field, text)))[0] == 200


# Clients that disconnect


def test_images_of_disconnected_clients_are_dropped(gated: GatedPipeline, start_server) -> None:
    """A waiting image is dropped, a running one is finished, and other clients get their images."""
    server = start_server(gated)
    gated.gate.clear()
    under_way, waiting = dial(server.address), dial(server.address)
    under_way.sendall(whole(json.dumps({"prompt": "under way"}).encode()))
    wait_until(lambda: gated.calls)
    waiting.sendall(whole(json.dumps({"prompt": "waiting"}).encode()))
    wait_until(lambda: len(server.service._jobs) == 1)
    with dial(server.address) as stays:
        stays.sendall(whole(json.dumps({"prompt": "stays"}).encode()))
        wait_until(lambda: len(server.service._jobs) == 2)
        waiting.close()
        under_way.close()
        wait_until(lambda: len(server.service._jobs) == 1)
        gated.gate.set()
        assert answer(stays)[0] == 200
    assert gated.prompts == ["under way", "stays"]
    figures = server.service.metrics.registry.get_sample_value
    wait_until(lambda: figures("hypersd_requests_total", {"path": GENERATIONS, "code": "499"}) == 2)
    assert figures("hypersd_dropped_images_total", {"reason": "cancelled"}) == 1


@pytest.mark.parametrize("sent", [b"", b"PO", head(Content_Length=100), whole(BODY)[:-3], whole(BODY)])
def test_a_client_that_disconnects_in_the_middle_of_a_request(sent: bytes, demo_server: RunningServer) -> None:
    for _ in range(5):
        with dial(demo_server.address) as connection:
            connection.sendall(sent)


def test_a_client_that_resets_its_connection(demo_server: RunningServer) -> None:
    connection = dial(demo_server.address)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sendall(whole(BODY))
    connection.close()


def test_the_end(demo_canny_bundle: Path, gated: GatedPipeline) -> None:
    """The begun image is delivered, waiting requests are rejected, and then nothing listens."""
    service = StandInService(demo_canny_bundle, gated)
    with RunningServer(service, ServeSettings()) as server:
        service.wait_ready()
        gated.gate.clear()
        with dial(server.address) as busy, dial(server.address) as waiting:
            busy.sendall(whole(BODY))
            wait_until(lambda: gated.calls)
            waiting.sendall(whole(BODY))
            wait_until(lambda: len(service._jobs) == 1)
            server.end()
            status, headers, body = answer(waiting)
            assert (status, error_of(body)["code"]) == (503, "stopping")
            assert int(headers["retry-after"]) >= 1
            gated.gate.set()
            assert answer(busy)[0] == 200
            server.wait_ended()
        with pytest.raises(ConnectionRefusedError):
            dial(server.address)


def test_out_of_memory(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated)

    def fail(prompts: list[str]) -> None:
        if "huge" in prompts:
            raise MemoryError

    gated.on_call = fail
    status, _, body = exchange(server.address, whole(json.dumps({"prompt": "huge"}).encode()))
    assert status == 500
    assert error_of(body)["message"].startswith("out of memory: generate smaller images")
    assert error_of(body) == error_of(body) | {"type": "server_error", "code": "engine_failed"}
    assert exchange(server.address, whole(BODY))[0] == 200
