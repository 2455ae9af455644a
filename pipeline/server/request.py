"""What clients send: a request in LibreTranslate's form, or what is wrong with it as a sentence."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import parse_qs

from fastapi import HTTPException, Request
from pydantic import BaseModel, Field, ValidationError

FORM, JSON = "application/x-www-form-urlencoded", "application/json"
ENDLESS = 1 << 26  # bytes; who sends a shorter body that is too long can finish, and listens


class TranslateRequest(BaseModel):
    """A request to translate, as LibreTranslate takes it. Other fields are ignored."""

    q: str | list[str] = Field(description="a text, or a list of texts; each line is translated")
    source: str = Field(description="the code of its language")
    target: str = Field(description="the code of the language that is wanted")
    format: Literal["text"] = Field("text", description="`text`; there is no `html`")
    alternatives: int = Field(0, ge=0, description="a number of other translations, from 0 on")
    alignment: bool = Field(False, description="true, for which words come from which, or false")

    @property
    def texts(self) -> list[str]:
        """Return the texts, if there is one or several."""
        return [self.q] if isinstance(self.q, str) else self.q


_SCHEMA = {"schema": TranslateRequest.model_json_schema()}
OPENAPI = {"requestBody": {"required": True, "content": {JSON: _SCHEMA, FORM: _SCHEMA}}}
"""What /docs says of the body, which FastAPI does not read itself."""


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    :param limit: in bytes.
    :raises HTTPException: it is longer.
    :raises ClientDisconnect: it never ended.
    """
    blocks, size = [], 0
    async for block in request.stream():
        size += len(block)
        if size <= limit:
            blocks.append(block)
        elif size > ENDLESS:
            break
    if size > limit:
        raise HTTPException(413, f"the body of a request may have {limit:,} bytes")
    return b"".join(blocks)


def parse(body: bytes, content_type: str) -> TranslateRequest:
    """Return the request in a body.

    :raises HTTPException: there is none.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (FORM, JSON, ""):
        raise HTTPException(415, f"Content-Type {kind}: expected {JSON} or {FORM}")
    try:
        text = body.decode("utf-8")
        if kind != FORM:
            return TranslateRequest.model_validate_json(text)
        fields = parse_qs(text, keep_blank_values=True, errors="strict")
        values = {name: each if len(each) > 1 else each[0] for name, each in fields.items()}
        return TranslateRequest.model_validate(values)
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"not valid UTF-8: {error.reason}") from error
    except ValidationError as error:
        raise HTTPException(400, _fault(error.errors()[0])) from error


def _fault(error: Any) -> str:
    """Return a sentence about the first of pydantic's errors."""
    if error["type"] == "json_invalid":
        return f"not valid JSON: {error['ctx']['error']}"
    if not error["loc"]:
        return f"expected a JSON object with {', '.join(TranslateRequest.model_fields)}"
    name = error["loc"][0]
    if error["type"] == "missing":
        return f"`{name}` is missing; it goes into JSON with Content-Type {JSON}, or into a form"
    return f"`{name}`: expected {TranslateRequest.model_fields[name].description}"
