"""Rows of the inference log on their way to disk: as they wait, and as columns."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import polars as pl

    from airflow_mlops.core.model.signature import ModelSignature
    from airflow_mlops.serving.log_settings import LogSettings

logger = logging.getLogger(__name__)

#: Prefix of the input fields' columns, so that a field named "prediction" is no clash.
FEATURE_PREFIX = "feature_"
#: Prefix of those that stand for an input: whoever computes with inputs must not take them for it.
PSEUDONYM_PREFIX = "pseudonym_"

#: Rows that are turned into columns before the requests get their turn: Python runs one thread at a time, and a request waits as
#: long as this takes (about a third of a millisecond) whenever it comes back from the model or the network.
_SLICE_ROWS = 128
#: How many times as long the requests have their turn then; once, where there is no time.
_TURNS = 4.0
_LONGEST_TURN = 0.005
_Make = Callable[[list[Any]], "pl.DataFrame"]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class LoggedRequest(NamedTuple):
    """What one request asked and was answered; references only."""

    model_name: str
    model_version: str
    signature: ModelSignature
    prediction_ids: Sequence[str]
    times: Sequence[datetime] | None
    columns: Mapping[str, Sequence[Any]]
    predictions: Sequence[Any]
    latency_ms: float
    request_id: str
    shadow: bool
    caller: str | None
    received_us: int
    size: int


class Kind(NamedTuple):
    """What rows have in common: the version that answered, and its inputs.

    :param number: of this kind among those of the log.
    :param names: of the inputs.
    :param texts: those of them that may be of any length.
    """

    number: int
    model_name: str
    model_version: str
    signature: ModelSignature
    names: tuple[str, ...]
    texts: tuple[str, ...]


#: A request of one row, as it waits: number of its kind, size, received, latency, request id, shadow, caller, prediction id, time, prediction, then
#: its inputs. A plain tuple of plain values: the garbage collector looks at such a one once, and at lists again and again. Those of
#: ten thousand requests held all others up for 30 ms.
LoggedRow = tuple[Any, ...]


def pack(request: LoggedRequest, kind: Kind) -> LoggedRequest | LoggedRow:
    """Give a request as it waits: one of one row as a plain tuple."""
    if len(request.predictions) != 1 or any(name not in request.columns for name in kind.names):
        return request
    return (
        kind.number,
        request.size,
        request.received_us,
        request.latency_ms,
        request.request_id,
        request.shadow,
        request.caller,
        request.prediction_ids[0],
        None if request.times is None else request.times[0],
        plain(request.predictions)[0],
        *[plain(request.columns[name])[0] for name in kind.names],
    )


class LoggedColumns:
    """What is logged of a request, as columns: sampled, and without what must not be on disk.

    :param settings: say so.
    """

    def __init__(self, settings: LogSettings) -> None:
        self.share = settings.share
        self.drop = frozenset(settings.drop)
        self.pseudonymize = frozenset(settings.pseudonymize)
        self.key = settings.key()
        self._known: set[int] = set()

    def look_at(self, signature: ModelSignature) -> None:
        """Say which declared columns a model does not have: a misspelt one would be logged in full."""
        if id(signature) in self._known:
            return
        self._known.add(id(signature))
        missing = sorted((self.drop | self.pseudonymize) - set(signature.names))
        if missing:
            logger.warning(
                "no input is named %s, so there is nothing to redact; the model takes %s",
                ", ".join(missing),
                ", ".join(signature.names),
            )

    def kept(self, name: str, kind: str) -> bool:
        """Tell whether an input is logged."""
        return name not in self.drop and not (kind == "number" and name in self.pseudonymize)

    def values(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        """Give an input's values as they are logged."""
        if name not in self.pseudonymize:
            return values
        return [None if value is None else pseudonym(value, self.key) for value in values]


class Slices:
    """Turns requests into frames, a slice of rows at a time, and lets requests in between.

    :param columns: what is logged.
    :param kinds: of the rows.
    :param hurry: whether so much waits that the log would fall behind.
    """

    def __init__(self, columns: LoggedColumns, kinds: Sequence[Kind], *, hurry: bool) -> None:
        self.columns = columns
        self.kinds = kinds
        self.frames: dict[str, list[pl.DataFrame]] = {}
        self.turns = 1.0 if hurry else _TURNS
        self.lost_rows = 0
        self._open: dict[tuple[str, int], list[LoggedRequest]] = {}
        self._open_rows: dict[int, list[LoggedRow]] = {}
        self._rows = 0

    def add(self, request: LoggedRequest) -> None:
        """Take a request."""
        try:
            parts = list(_in_slices(request))
        except Exception as err:  # noqa: BLE001 - as below
            self._lose(request.model_name, len(request.predictions), err)
            return
        for part in parts:
            self._open.setdefault((part.model_name, id(part.signature)), []).append(part)
            self._count(len(part.predictions))

    def add_row(self, row: LoggedRow) -> None:
        """Take a request of one row."""
        self._open_rows.setdefault(row[0], []).append(row)
        self._count(1)

    def _count(self, rows: int) -> None:
        self._rows += rows
        if self._rows >= _SLICE_ROWS:
            self.finish()

    def finish(self) -> None:
        """Turn what was taken into frames."""
        for number, rows in self._open_rows.items():
            kind = self.kinds[number]
            self._take_turns(kind.model_name, rows, partial(_frame_of_rows, kind=kind, columns=self.columns))
        for (model_name, _), requests in self._open.items():
            self._take_turns(model_name, requests, partial(_frame, columns=self.columns))
        self._open.clear()
        self._open_rows.clear()
        self._rows = 0

    def _take_turns(self, model_name: str, items: list[Any], make: _Make) -> None:
        started = time.perf_counter()
        self.frames.setdefault(model_name, []).extend(self._build(model_name, items, make))
        time.sleep(min(self.turns * (time.perf_counter() - started), _LONGEST_TURN))

    def _build(self, model_name: str, items: list[Any], make: _Make) -> list[pl.DataFrame]:
        try:
            return [make(items)]
        except Exception as err:  # noqa: BLE001 - one request's rows must not cost the others theirs
            if len(items) > 1:
                return [frame for item in items for frame in self._build(model_name, [item], make)]
            (item,) = items
            self._lose(model_name, len(item.predictions) if isinstance(item, LoggedRequest) else 1, err)
            return []

    def _lose(self, model_name: str, lost: int, err: Exception) -> None:
        self.lost_rows += lost
        # The error's text may hold values, and these may be personal.
        logger.error("%d rows of %s can't be stored and are lost: %s", lost, model_name, type(err).__name__)


def _in_slices(request: LoggedRequest) -> Iterator[LoggedRequest]:
    count = len(request.predictions)
    if count <= _SLICE_ROWS:
        yield request
        return
    for start in range(0, count, _SLICE_ROWS):
        part = slice(start, start + _SLICE_ROWS)
        yield request._replace(
            prediction_ids=request.prediction_ids[part],
            times=None if request.times is None else request.times[part],
            columns={name: values[part] for name, values in request.columns.items()},
            predictions=request.predictions[part],
        )


def _frame(requests: list[LoggedRequest], columns: LoggedColumns) -> pl.DataFrame:
    """Give requests of one signature as rows."""
    import polars as pl

    # Of each request once; then, where some have several rows, for each of their rows.
    counts = [len(request.predictions) for request in requests]
    owners = pl.Series(np.repeat(np.arange(len(requests)), counts))

    def each(values: list[Any], kind: pl.datatypes.DataTypeClass) -> pl.Series:
        return pl.Series(values, dtype=kind).gather(owners)

    def rows_of(values: Iterable[Any]) -> list[Any]:
        return list(chain.from_iterable(map(plain, values)))

    received = each([request.received_us for request in requests], pl.Int64)
    signature = requests[0].signature
    return _logged(
        signature,
        columns,
        ids=rows_of(request.prediction_ids for request in requests),
        times=_times(requests, received),
        received=received,
        model_name=each([request.model_name for request in requests], pl.String),
        model_version=each([request.model_version for request in requests], pl.String),
        latency_ms=each([request.latency_ms for request in requests], pl.Float64),
        request_id=each([request.request_id for request in requests], pl.String),
        shadow=each([request.shadow for request in requests], pl.Boolean),
        caller=each([request.caller for request in requests], pl.String),
        predictions=rows_of(request.predictions for request in requests),
        inputs=(rows_of(request.columns[name] for request in requests) for name in signature.names),
    )


def _frame_of_rows(rows: list[LoggedRow], kind: Kind, columns: LoggedColumns) -> pl.DataFrame:
    """Give requests of one row each."""
    import polars as pl

    _, _, received_us, latencies, requests, shadow, callers, ids, times, predictions, *inputs = zip(
        *rows, strict=True
    )
    received = pl.Series(received_us, dtype=pl.Int64)
    instants = received
    if any(times):
        both = zip(times, received_us, strict=True)
        instants = pl.Series(
            [at if when is None else _microseconds(when) for when, at in both], dtype=pl.Int64
        )
    return _logged(
        kind.signature,
        columns,
        ids=ids,
        times=instants,
        received=received,
        model_name=pl.repeat(kind.model_name, len(rows), dtype=pl.String, eager=True),
        model_version=pl.repeat(kind.model_version, len(rows), dtype=pl.String, eager=True),
        latency_ms=pl.Series(latencies, dtype=pl.Float64),
        request_id=pl.Series(requests, dtype=pl.String),
        shadow=pl.Series(shadow, dtype=pl.Boolean),
        caller=pl.Series(callers, dtype=pl.String),
        predictions=predictions,
        inputs=inputs,
    )


def _logged(
    signature: ModelSignature,
    columns: LoggedColumns,
    *,
    ids: Sequence[str],
    times: pl.Series,
    received: pl.Series,
    predictions: Sequence[Any],
    inputs: Iterable[Sequence[Any]],
    **known: pl.Series,
) -> pl.DataFrame:
    """Give rows as the log holds them: sampled, and without what must not be on disk.

    :param times: microseconds.
    :param inputs: in the order of the signature's.
    """
    import polars as pl

    columns.look_at(signature)
    instant = pl.Datetime("us", "UTC")
    logged = {
        "prediction_id": pl.Series(ids, dtype=pl.String),
        "time": times.cast(instant),
        "received_at": received.cast(instant),
        **known,
        "prediction": pl.Series(predictions, strict=False),
    }
    for field, given in zip(signature.inputs, inputs, strict=True):
        name = field.name
        if columns.kept(name, field.type):
            kind = pl.Float64 if field.type == "number" else pl.String
            prefix = PSEUDONYM_PREFIX if name in columns.pseudonymize else FEATURE_PREFIX
            logged[prefix + name] = pl.Series(columns.values(name, given), dtype=kind, strict=False)
    frame = pl.DataFrame(logged)
    if columns.share < 1.0:
        frame = frame.filter(pl.Series([is_sampled(item, columns.share) for item in ids], dtype=pl.Boolean))
    return frame


def _times(requests: list[LoggedRequest], received: pl.Series) -> pl.Series:
    """Give event times, microseconds; of rows without one when they were received."""
    import polars as pl

    if all(request.times is None for request in requests):
        return received
    times: list[int] = []
    for request in requests:
        if request.times is None:
            times.extend([request.received_us] * len(request.predictions))
        else:
            times.extend(map(_microseconds, request.times))
    return pl.Series(times, dtype=pl.Int64)


def _microseconds(instant: datetime) -> int:
    return (instant - _EPOCH) // _MICROSECOND


def plain(values: Any) -> Any:
    """Give an array as a list."""
    return values if type(values) is list or not hasattr(values, "tolist") else values.tolist()


def is_sampled(prediction_id: str, share: float) -> bool:
    """Tell whether a prediction is logged: by its id alone, so that every service and every repetition decides alike.

    :param share: in ``(0, 1]``.

    >>> is_sampled("a", 1.0)
    True
    """
    digest = hashlib.blake2b(prediction_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def pseudonym(value: object, key: bytes) -> str:
    """Give what stands for a value in the log: the same for the same value, and of no use without the key."""
    return hmac.digest(key, str(value).encode(), "sha256").hex()[:32]
