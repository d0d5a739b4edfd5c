"""Reads the body of POST /v1/images/edits: a form, as OpenAI's clients send it, or JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..errors import RequestError
from .form_data import LONGEST_NAME, MEDIA_TYPE, read_form
from .live import is_same_origin
from .schemas import EditRequest

JSON_TYPE = "application/json"
FILES = ("image", "mask", "control_image")


async def read_edit(request: Request) -> EditRequest:
    """The request in a body of either type.

    Raises:
        HTTPException: the body is of another type, or the page of another site sends it: browsers ask the service
            before they send JSON for such a page, but not before they send a form.
        RequestError: the form is damaged.
        RequestValidationError: a field is wrong.
    """
    try:
        return await _read(request)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None


async def _read(request: Request) -> EditRequest:
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == JSON_TYPE:
        return EditRequest.model_validate_json(await request.body())
    if media_type != MEDIA_TYPE:
        raise HTTPException(400, f"a body of the type {media_type[:80]!r}: expected {MEDIA_TYPE} or {JSON_TYPE}")
    if not is_same_origin(request.headers):
        raise HTTPException(403, "the page of another site asks: open the service's own page, or ask from a program")
    body = await request.body()
    return await asyncio.to_thread(lambda: form_request(read_form(content_type, body)))


def form_request(fields: dict[str, Any]) -> EditRequest:
    """The request in a form's fields: text, from which numbers are read, and files.

    Raises:
        RequestError: a file takes the place of a text.
        ValidationError: a field is wrong.
    """
    files = {name: value for name, value in fields.items() if name in FILES}
    text = {name: value for name, value in fields.items() if name not in files}
    if isinstance(text.get("adapters"), str):
        text["adapters"] = _strengths(text["adapters"])
    if wrong := [name for name, value in text.items() if _has_file(value)]:
        raise RequestError(f"{wrong[0][:LONGEST_NAME]} is a file: expected a field without a filename")
    # The contents of files are no text, which alone is validated here.
    named = {name: dict.fromkeys(file, "") if isinstance(file, dict) else "" for name, file in files.items()}
    return EditRequest.model_validate_strings(text | named).model_copy(update=files)


def _strengths(text: str) -> dict[str, str]:
    """The field ``adapters`` that comes as JSON, as if it came in parts named ``adapters[style]``."""
    try:
        given = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not all(isinstance(strength, str) for strength in given.values()):
        raise RequestError('adapters: expected strengths by name, such as {"style": 0.8}, or a part adapters[style]')
    return given


def _has_file(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and any(map(_has_file, value.values())))


def edit_body() -> dict[str, Any]:
    """The body of an edit in the OpenAPI description."""
    schema = EditRequest.model_json_schema()
    form = {**schema, "properties": {**schema["properties"]}}
    for name in FILES:
        about = {"description": schema["properties"][name]["description"]}
        form["properties"][name] = {"type": "string", "format": "binary", **about}
    content = {MEDIA_TYPE: {"schema": form}, JSON_TYPE: {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}
