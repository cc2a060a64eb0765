"""Requests for predictions: read, taken apart, and checked as far as that does not depend on the model."""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

MAXIMUM_ROWS = 10_000
MAXIMUM_BYTES = 16 * 1024 * 1024
#: Characters of a prediction id.
MAXIMUM_ID = 256


class RequestError(Exception):
    """A request that gets an answer other than 200.

    :param status: HTTP status.
    :param message: what is wrong, for whoever asked.
    :param model_version: version that failed on it, where one did.
    """

    def __init__(self, status: int, message: str, *, model_version: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.model_version = model_version


def parse(body: Any) -> tuple[list[dict[str, Any]], list[str], list[datetime] | None]:
    """Take a request apart and check what does not depend on the model."""
    rows = body.get("rows") if isinstance(body, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestError(422, 'the body must be {"rows": [{"field": value, ...}, ...]}')
    if len(rows) > MAXIMUM_ROWS:
        raise RequestError(413, f"{len(rows)} rows; at most {MAXIMUM_ROWS} in one request")
    ids = body.get("prediction_ids")
    if ids is None:
        ids = [uuid.uuid4().hex for _ in rows]
    elif not isinstance(ids, list) or len(ids) != len(rows):
        raise RequestError(422, f"prediction_ids: a list of {len(rows)} ids is needed, one per row")
    return (
        rows,
        [_parse_id(index, item) for index, item in enumerate(ids)],
        _parse_times(body.get("times"), len(rows)),
    )


def _parse_id(index: int, item: Any) -> str:
    text = str(item)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    if not isinstance(item, str | int) or not 0 < len(text) <= MAXIMUM_ID:
        raise RequestError(
            422,
            f"prediction_ids[{index}]: a text of 1 to {MAXIMUM_ID} characters is needed, got {item!r:.60}",
        )
    return text


def _parse_times(times: Any, count: int) -> list[datetime] | None:
    if times is None:
        return None
    if not isinstance(times, list) or len(times) != count:
        raise RequestError(422, f"times: a list of {count} ISO 8601 times is needed, one per row")
    parsed = []
    for index, item in enumerate(times):
        try:
            instant = datetime.fromisoformat(item)
            parsed.append(instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC))
        except (TypeError, ValueError, OverflowError) as err:
            raise RequestError(422, f"times[{index}]: {item!r:.60} is not an ISO 8601 time") from err
    return parsed


async def read_json(headers: Mapping[bytes, bytes], receive: Receive) -> Any:
    """Read the body, at most :data:`MAXIMUM_BYTES` of it."""
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > MAXIMUM_BYTES:
        raise RequestError(413, f"{int(length)} bytes; at most {MAXIMUM_BYTES} in one request")
    chunks, size = [], 0
    while True:
        message = await receive()
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAXIMUM_BYTES:
            raise RequestError(413, f"more than {MAXIMUM_BYTES} bytes in one request")
        chunks.append(chunk)
        if not message.get("more_body"):
            break
    try:
        return json.loads(b"".join(chunks), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise RequestError(422, f"the body is not JSON: {err}") from err


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; send null for a missing number")
