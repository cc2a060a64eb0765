"""Answers: encoded, and sent as ASGI messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

import msgspec

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = b"application/json"

_encode = msgspec.json.Encoder().encode


class Response(NamedTuple):
    """An answer.

    :param status: HTTP status.
    :param body: its bytes.
    :param content_type: of the body.
    :param headers: further ones.
    """

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


def json_response(status: int, body: Any, *headers: tuple[bytes, bytes]) -> Response:
    """Answer with JSON."""
    return Response(status, _encode(body), headers=headers)


async def respond(send: Send, response: Response, request_id: bytes, *, last: bool = False) -> None:
    """Send an answer.

    :param last: tell the caller to ask on another connection from now on.
    """
    status, body, content_type, more = response
    headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id),
        *more,
    ]
    if last:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
