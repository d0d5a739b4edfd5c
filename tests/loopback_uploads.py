"""The writing half of the loopback Hub: repositories, LFS objects and commits, as huggingface_hub sends them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

LFS_BYTES = 1024
PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/[^/]+")
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/[^/]+")
UPLOAD = re.compile(r"/uploads/(?P<oid>[0-9a-f]{64})")


class Refusal(NamedTuple):
    """An answer with an error status."""

    status: int
    message: str
    fields: dict[str, str] | None = None  # besides the message


class Uploads:
    """Objects that were sent, and the commits that put them into a repository's folder.

    Attributes:
        objects: LFS objects by SHA-256; those of an interrupted upload stay, as on the Hub.
        received: bytes of objects that were sent.
        private: the repositories that were made private.
        fail_after: refuse objects once so many were received; None accepts all.
    """

    def __init__(self, root: Path, url: str) -> None:
        self.root = root
        self.url = url
        self.objects: dict[str, bytes] = {}
        self.received = 0
        self.private: set[str] = set()
        self.fail_after: int | None = None

    def post(self, path: str, body: bytes) -> dict[str, Any] | Refusal:
        """The answer to a POST."""
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if PREUPLOAD.fullmatch(path):
            files = json.loads(body)["files"]
            modes = [(file["path"], "lfs" if file["size"] >= LFS_BYTES else "regular") for file in files]
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]}
        if BATCH.fullmatch(path):
            return {"transfer": "basic", "objects": [self._action(each) for each in json.loads(body)["objects"]]}
        if match := COMMIT.fullmatch(path):
            return self._commit(match["repo"], body)
        return Refusal(404, "Not Found")

    def put(self, path: str, body: bytes) -> Refusal | None:
        """Keep an object; the refusal, if any."""
        match = UPLOAD.fullmatch(path)
        if match is None or hashlib.sha256(body).hexdigest() != match["oid"]:
            return Refusal(400, "the object is not what its name says")
        if self.fail_after is not None and len(self.objects) >= self.fail_after:
            return Refusal(403, "the address has expired")  # of a 5xx the client would wait and try again
        self.objects[match["oid"]] = body
        self.received += len(body)
        return None

    def _create(self, asked: dict[str, Any]) -> dict[str, Any] | Refusal:
        repo = f"{asked['organization']}/{asked['name']}"
        if (self.root / repo).is_dir():
            return Refusal(409, "You already created this model repo", {"url": f"{self.url}/{repo}"})
        (self.root / repo).mkdir(parents=True)
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repo)
        return {"url": f"{self.url}/{repo}", "name": repo}

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.objects:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.url}/uploads/{asked['oid']}"}}}

    def _commit(self, repo: str, body: bytes) -> dict[str, Any] | Refusal:
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                continue
            path = self.root / repo / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            lfs = entry["key"] == "lfsFile"
            path.write_bytes(self.objects[value["oid"]] if lfs else base64.b64decode(value["content"]))
        oid = hashlib.sha1(body).hexdigest()
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}
