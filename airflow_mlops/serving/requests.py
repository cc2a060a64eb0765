"""Requests for predictions: bodies read within limits, and checked against a model's signature in one pass."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from airflow_mlops.core.data.categories import number_text
from airflow_mlops.exceptions import SignatureMismatchError

if TYPE_CHECKING:
    from airflow_mlops.core.model.signature import ModelSignature

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

#: Characters of a prediction id.
MAXIMUM_ID = 256

#: Bodies of the largest size that a worker has room for while they come in.
BODIES_AT_ONCE = 16


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


class NotJsonError(RequestError):
    """A body that is no JSON."""


class PredictionRequest(NamedTuple):
    """A request that fits the model.

    :param columns: one list per input: numbers as ``float`` (missing as NaN), text as ``str`` or ``None``.
    :param size: rows; at least one.
    :param prediction_ids: one per row; ``None``: the service makes them.
    :param times: event times, one per row; ``None``: now.
    """

    columns: dict[str, list[Any]]
    size: int
    prediction_ids: list[str] | None
    times: list[datetime] | None


#: The last digits of ids that are made together.
_ENDINGS = [f"{number:03x}" for number in range(4_096)]


class IdMaker:
    """Makes ids of 32 hexadecimal digits that no other worker makes, without asking the system for random ones each time.

    Only for one thread.
    """

    def __init__(self) -> None:
        self._worker = os.urandom(10).hex()
        self._blocks = itertools.count()

    def one(self) -> str:
        """Make an id."""
        return f"{self._worker}{next(self._blocks):09x}000"

    def many(self, count: int) -> list[str]:
        """Make several."""
        made: list[str] = []
        while len(made) < count:
            start = f"{self._worker}{next(self._blocks):09x}"
            made += [start + ending for ending in _ENDINGS[: count - len(made)]]
        return made


class RequestDecoder:
    """Reads JSON bodies for one signature.

    What fits is decoded, checked and turned into columns by code that is made for the signature. What does not is read again the
    slow way, which accepts a few things more (such as ``true`` for a number) and names row, field and type of what is wrong. Where an
    input's name can't be a field's, as one with a quotation mark, everything is read that way: it gives the same, but takes longer.

    :param signature: of the model.
    """

    def __init__(self, signature: ModelSignature) -> None:
        self._signature = signature
        self._names = signature.names
        self._numbers = [i for i, field in enumerate(signature.inputs) if field.type == "number"]
        self._texts = [i for i, field in enumerate(signature.inputs) if field.type == "string"]
        self._decode = None if any(map(_is_no_field, self._names)) else self._made_for(signature)

    def _made_for(self, signature: ModelSignature) -> Callable[[bytes], Any]:
        names = {f"field_{i}": name for i, name in enumerate(self._names)}
        kinds: list[Any] = []
        for field in signature.inputs:
            # Categories often travel as numbers, whole ones also as fractions.
            kind: Any = float if field.type == "number" else str | int | float
            kinds.append(kind | None if field.nullable else kind)
        row = msgspec.defstruct("Row", list(zip(names, kinds, strict=True)), rename=names, gc=False)
        lists: list[Any] = [(name, list[kind]) for name, kind in zip(names, kinds, strict=True)]  # type: ignore[valid-type]
        columns = msgspec.defstruct("Columns", lists, rename=names)
        body = msgspec.defstruct(
            "Body",
            [
                ("rows", list[row], None),  # type: ignore[valid-type]
                ("row", row, None),
                ("columns", columns, None),
                ("prediction_ids", list[str | int] | None, None),
                ("times", list[str] | None, None),
            ],
        )
        decode: Callable[[bytes], Any] = msgspec.json.Decoder(body).decode
        return decode

    def decode(self, data: bytes, maximum_rows: int) -> PredictionRequest:
        """Read a body.

        :raises RequestError: it is no JSON, does not fit the signature, or has too many rows.
        """
        if self._decode is None:
            return self._decode_slowly(data, maximum_rows)
        try:
            body = self._decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._decode_slowly(data, maximum_rows)
        rows = body.rows if body.row is None else [body.row]
        if (rows is None) is (body.columns is None) or (body.row is not None and body.rows is not None):
            return self._decode_slowly(data, maximum_rows)
        if rows is None:
            values: list[list[Any]] = list(map(list, msgspec.structs.astuple(body.columns)))
        elif len(rows) == 1:
            values = [[value] for value in msgspec.structs.astuple(rows[0])]
        else:
            values = list(map(list, zip(*map(msgspec.structs.astuple, rows), strict=True)))
        count = len(values[0]) if values else 0
        if not count or (rows is None and any(len(column) != count for column in values)):
            return self._decode_slowly(data, maximum_rows)
        _require_rows(count, maximum_rows)
        for i in self._numbers:
            if None in values[i]:
                values[i] = [math.nan if value is None else value for value in values[i]]
        for i in self._texts:
            values[i] = [
                str(value) if type(value) is int else number_text(value) if type(value) is float else value
                for value in values[i]
            ]
        return PredictionRequest(
            dict(zip(self._names, values, strict=True)),
            count,
            _parse_ids(body.prediction_ids, count),
            _parse_times(body.times, count),
        )

    def _decode_slowly(self, data: bytes, maximum_rows: int) -> PredictionRequest:
        columns, body = self._columns_of(parse_json(data), maximum_rows)
        count = len(next(iter(columns.values())))
        return PredictionRequest(
            columns,
            count,
            _parse_ids(body.get("prediction_ids"), count),
            _parse_times(body.get("times"), count),
        )

    def _columns_of(self, body: Any, maximum_rows: int) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        given = [
            name
            for name in ("rows", "row", "columns")
            if isinstance(body, dict) and body.get(name) is not None
        ]
        rows = [body["row"]] if given == ["row"] else body["rows"] if given == ["rows"] else []
        if len(given) != 1 or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise RequestError(
                422,
                'the body must be {"rows": [{"field": value, ...}, ...]}, {"row": {...}} or {"columns": {"field": [value, ...], ...}}',
            )
        try:
            if given != ["columns"]:
                _require_rows(len(rows), maximum_rows)
                return self._signature.columns_from_records(rows), body
            if not isinstance(body["columns"], dict):
                raise SignatureMismatchError("columns: expected one list per field")
            longest = max((len(one) for one in body["columns"].values() if isinstance(one, list)), default=0)
            _require_rows(longest, maximum_rows)
            return self._signature.columns_from_columns(body["columns"]), body
        except SignatureMismatchError as err:
            raise RequestError(422, str(err)) from err


def _is_no_field(name: str) -> bool:
    """Tell whether msgspec takes no field of this name: in JSON it does not stand as it is, but with escapes."""
    return any(character in '"\\' or character < " " for character in name)


def _require_rows(count: int, maximum: int) -> None:
    if count > maximum:
        raise RequestError(413, f"{count} rows; at most {maximum} in one request")


def _parse_ids(ids: Sequence[Any] | None, count: int) -> list[str] | None:
    if ids is None:
        return None
    if not isinstance(ids, list) or len(ids) != count:
        raise RequestError(422, f"prediction_ids: a list of {count} ids is needed, one per row")
    parsed = [_parse_id(index, item) for index, item in enumerate(ids)]
    require_unique(parsed, "prediction_ids")
    return parsed


def require_unique(ids: Sequence[str], where: str) -> None:
    """See that each row has an id of its own: rows that share one are one prediction to whoever reads the log.

    :param where: what the caller calls them.
    :raises RequestError: names the second of two.
    """
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    for index, item in enumerate(ids):
        if item in seen:
            raise RequestError(
                422,
                f"{where}[{index}]: {item!r:.60} is the id of another row; labels are joined by it, so each row needs its own",
            )
        seen.add(item)


def _parse_id(index: int, item: Any) -> str:
    text = str(item)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    if isinstance(item, bool) or not isinstance(item, str | int) or not 0 < len(text) <= MAXIMUM_ID:
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


class BodyReader:
    """Reads bodies within limits: of bytes, of time, and of bytes in all the bodies that are not there as a whole yet.

    A body that comes in one piece, as small ones do, is never held up by others that come slowly.

    :param maximum_bytes: bytes of one body.
    :param seconds: until a body must be there as a whole; looked at ten times in as long.
    """

    def __init__(self, maximum_bytes: int, seconds: float) -> None:
        self._maximum_bytes = maximum_bytes
        self._seconds = seconds
        self._held = 0
        # Who reads, and since when, longest first. One timer for all: one each would cost more than reading does.
        self._reading: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """Read a body; from a task of its own for each request, as servers do.

        :raises RequestError: it has too many bytes or takes too long, too much is being read, or whoever sent it went away.
        """
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._maximum_bytes:
            raise RequestError(413, f"{int(length)} bytes; at most {self._maximum_bytes} in one request")
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._reading[task] = time.monotonic()
        if self._timer is None:
            self._look_later()
        try:
            message = await receive()
            if message.get("more_body"):
                return await self._read_on(message, receive)
        except asyncio.CancelledError as err:
            if task not in self._late or task.uncancel():
                raise
            raise RequestError(
                408,
                f"the body was not there within {self._seconds:g} seconds; send it faster, or fewer rows in one request",
            ) from err
        finally:
            del self._reading[task]
            self._late.discard(task)
        _require_connected(message)
        body: bytes = message.get("body", b"")
        return _within(body, self._maximum_bytes)

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds / 10, self._end_late)

    def _end_late(self) -> None:
        """Interrupt who has been reading for too long."""
        self._timer = None
        earliest = time.monotonic() - self._seconds
        for task, since in self._reading.items():
            if since > earliest:
                break
            if task not in self._late:
                self._late.add(task)
                task.cancel()
        if self._reading:
            self._look_later()

    async def _read_on(self, message: MutableMapping[str, Any], receive: Receive) -> bytes:
        """Read the rest of a body that comes in several pieces."""
        chunks: list[bytes] = []
        size = 0
        try:
            while True:
                _require_connected(message)
                chunk = message.get("body", b"")
                chunks.append(chunk)
                size += len(chunk)
                self._held += len(chunk)
                if not message.get("more_body") or size > self._maximum_bytes:
                    return _within(b"".join(chunks), self._maximum_bytes)
                if self._held > BODIES_AT_ONCE * self._maximum_bytes:
                    raise RequestError(429, f"{self._held} bytes of bodies are being read; come again")
                message = await receive()
        finally:
            self._held -= size


def _require_connected(message: Mapping[str, Any]) -> None:
    if message["type"] == "http.disconnect":
        raise RequestError(400, "the connection was closed before the body was there")


def _within(body: bytes, maximum_bytes: int) -> bytes:
    if len(body) > maximum_bytes:
        raise RequestError(413, f"more than {maximum_bytes} bytes in one request")
    return body


def parse_json(data: bytes) -> Any:
    """Read JSON, and nothing that only resembles it.

    :raises RequestError: it is none.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise NotJsonError(422, f"the body is not JSON: {err}") from err


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; send null for a missing number")
