"""Prometheus metrics of the endpoint: counted as plain numbers while requests are answered, published by a thread.

BentoML adds up what its workers published and exposes it on ``/metrics`` beside its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.core.profiles.profile_format import PREDICTION, REFERENCE_PROFILE_FILE, profile_from_json
from airflow_mlops.core.rollouts.observations import AnswerCells

if TYPE_CHECKING:
    from airflow_mlops.serving.reconciler import Routes

#: Upper ends of the cells that times are counted in, seconds; a tabular model answers within the first few.
BUCKETS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)

#: Rows between two publications from which on no more requests are looked into, for answers and missing inputs: enough for
#: shares, and cheap.
MAXIMUM_INSPECTED = 1_000

#: Pause between two fields that are looked into: without it, requests wait for as long as Python lets one thread run.
_PAUSE_SECONDS = 0.0005

#: Cells that the predictions of a regression are counted in, at most.
MAXIMUM_CELLS = 12


class _Answered(NamedTuple):
    """Rows that were answered, to be looked into later."""

    version: str
    columns: Mapping[str, Sequence[Any]]
    predictions: Sequence[Any]


class _Times:
    """Times of one version's requests."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0


class _Tally:
    """Requests of one kind by version: they only ever grow in the thread that answers; who publishes remembers how far it came.

    :param requests: counter by version and status.
    :param rows: counter by version.
    :param times: histogram by version.
    """

    def __init__(self, requests: Any, rows: Any, times: Any) -> None:
        self._published_requests, self._published_rows, self._published_times = requests, rows, times
        self._requests: dict[tuple[str, int], int] = {}
        self._rows: dict[str, int] = {}
        self._times: dict[str, _Times] = {}
        self._done: dict[Any, float] = {}

    def count(self, version: str, status: int) -> None:
        """Count one request by its answer."""
        key = (version, status)
        self._requests[key] = self._requests.get(key, 0) + 1

    def add(self, version: str, rows: int, seconds: float) -> None:
        """Count what one request got."""
        self._rows[version] = self._rows.get(version, 0) + rows
        times = self._times.get(version)
        if times is None:
            times = self._times[version] = _Times()
        times.counts[bisect_left(BUCKETS, seconds)] += 1
        times.total += seconds

    def publish(self) -> None:
        """Bring what is exposed up to date."""
        for (version, status), count in dict(self._requests).items():
            grown = self._grown(("requests", version, status), count)
            if grown:
                self._published_requests.labels(version, str(status)).inc(grown)
        for version, count in dict(self._rows).items():
            grown = self._grown(("rows", version), count)
            if grown:
                self._published_rows.labels(version).inc(grown)
        for version, times in dict(self._times).items():
            counts, total = list(times.counts), times.total
            cells = [int(self._grown(("times", version, i), count)) for i, count in enumerate(counts)]
            self._published_times.labels(version).add(cells, self._grown(("seconds", version), total))

    def _grown(self, key: Any, total: float) -> float:
        grown = total - self._done.get(key, 0)
        self._done[key] = total
        return grown


class _Cells(NamedTuple):
    """Cells of a version's predictions, and what they are called."""

    cells: AnswerCells
    names: tuple[str, ...]


class EndpointMetrics:
    """What a worker counts, and its publication.

    Made when the service starts, not at import: BentoML first has to say where its workers share their metrics.

    :param waiting_rows: gives the rows that wait for the inference log to write them.
    :param shed_rows: gives the rows it had no room for, since the start.
    """

    def __init__(self, *, waiting_rows: Callable[[], int], shed_rows: Callable[[], int]) -> None:
        from prometheus_client import Counter, Gauge

        _forget_dead_workers()
        by_version = ["model_version"]
        by_status = ["model_version", "status"]
        self._predictions = _Tally(
            Counter("airflow_mlops_requests_total", "Requests for predictions", by_status),
            Counter("airflow_mlops_predictions_total", "Rows predicted", by_version),
            _histogram()(
                "airflow_mlops_predict_seconds", "Time to answer one request", by_version, buckets=BUCKETS
            ),
        )
        self._explanations = _Tally(
            Counter("airflow_mlops_explanation_requests_total", "Requests for explanations", by_status),
            Counter("airflow_mlops_explained_rows_total", "Rows explained", by_version),
            _histogram()(
                "airflow_mlops_explain_seconds", "Time to explain one request", by_version, buckets=BUCKETS
            ),
        )
        self._published_shed = Counter(
            "airflow_mlops_shed_log_rows_total", "Rows the inference log had no room for"
        )
        self._published_waiting = Gauge(
            "airflow_mlops_log_waiting_rows", "Rows that wait to be logged", multiprocess_mode="livesum"
        )
        self._published_inspected = Counter(
            "airflow_mlops_inspected_rows_total", "Rows looked into for what follows", by_version
        )
        self._published_cells = Counter(
            "airflow_mlops_prediction_cells_total", "Predictions by cell", ["model_version", "cell"]
        )
        self._published_nulls = Counter(
            "airflow_mlops_null_inputs_total", "Missing inputs", ["model_version", "field"]
        )
        self._published_share = Gauge(
            "airflow_mlops_version_share",
            "Share of requests a version answers",
            by_version,
            multiprocess_mode="livemostrecent",
        )
        self._published_until = Gauge(
            "airflow_mlops_model_trained_until_timestamp_seconds",
            "End of the rows a version learned from",
            by_version,
            multiprocess_mode="livemostrecent",
        )
        self._published_live = Gauge(
            "airflow_mlops_model_live_timestamp_seconds",
            "When a worker last began to answer with a version",
            by_version,
            multiprocess_mode="livemostrecent",
        )
        self._waiting_rows, self._shed_rows = waiting_rows, shed_rows
        self._published_shed_rows = 0
        self._answered: deque[_Answered] = deque()
        self._waiting_inspection = 0
        self._cells: dict[str, _Cells] = {}
        self._shares: set[str] = set()
        self._answering: set[str] = set()
        self._publishing = threading.Lock()

    def count_request(self, model_version: str, status: int) -> None:
        """Count one request by its answer."""
        self._predictions.count(model_version, status)

    def count_explanation(
        self, model_version: str, status: int, *, rows: int = 0, seconds: float = 0.0
    ) -> None:
        """Count one request for explanations by its answer, and what was explained."""
        self._explanations.count(model_version, status)
        if rows:
            self._explanations.add(model_version, rows, seconds)

    def count_answer(
        self,
        model_version: str,
        *,
        columns: Mapping[str, Sequence[Any]],
        predictions: Sequence[Any],
        seconds: float,
    ) -> None:
        """Count one request's predictions."""
        rows = len(predictions)
        self._predictions.add(model_version, rows, seconds)
        if self._waiting_inspection < MAXIMUM_INSPECTED:
            self._waiting_inspection += rows
            self._answered.append(_Answered(model_version, columns, predictions))

    def began(self, routes: Routes, serving_dir: Path) -> None:
        """Note what answers from now on."""
        state, now = routes.state, time.time()
        shares = {one.model_version: one.share for one in state.versions}
        for name in self._shares - set(shares):
            self._published_share.labels(name).set(0.0)
        for name, share in shares.items():
            self._published_share.labels(name).set(share)
            manifest = routes.versions[name].model.manifest
            if name not in self._cells:
                folder = serving_dir / state.folder(
                    next(one for one in state.versions if one.model_version == name)
                )
                self._cells[name] = _cells_of(manifest.classes, folder)
                for cell in self._cells[
                    name
                ].names:  # one that is not there yet can't be compared with a day ago
                    self._published_cells.labels(name, cell)
            if share > 0.0 and name not in self._answering:
                self._published_live.labels(name).set(now)
            until = manifest.trained_on.window_end
            if until is not None:
                self._published_until.labels(name).set(until.timestamp())
        self._shares |= set(shares)
        self._answering = {name for name, share in shares.items() if share > 0.0}

    def publish(self) -> None:
        """Bring what is exposed up to date."""
        with self._publishing:
            self._predictions.publish()
            self._explanations.publish()
            shed = self._shed_rows()
            if shed > self._published_shed_rows:
                self._published_shed.inc(shed - self._published_shed_rows)
                self._published_shed_rows = shed
            self._published_waiting.set(self._waiting_rows())
            self._inspect()

    def _inspect(self) -> None:
        by_version: dict[str, list[_Answered]] = {}
        while self._answered:
            answered = self._answered.popleft()
            by_version.setdefault(answered.version, []).append(answered)
        self._waiting_inspection = 0
        for version, requests in by_version.items():
            predictions = [one for request in requests for one in request.predictions]
            self._published_inspected.labels(version).inc(len(predictions))
            cells = self._cells.get(version)
            if cells is not None:
                for name, count in zip(cells.names, cells.cells.counts(predictions).tolist(), strict=True):
                    if count:
                        self._published_cells.labels(version, name).inc(count)
            for field in requests[0].columns:
                nulls = sum(_nulls(request.columns[field]) for request in requests)
                self._published_nulls.labels(version, field).inc(nulls)
                time.sleep(_PAUSE_SECONDS)


def _nulls(values: Sequence[Any]) -> int:
    return sum(value is None or value != value for value in values)  # NaN is the one that is not itself


def _histogram() -> Any:
    """Give a histogram that takes counts: one publication instead of one call per request."""
    from prometheus_client import Histogram

    class CountedHistogram(Histogram):
        def add(self, counts: Sequence[int], total: float) -> None:
            """Add observations by cell, and their sum."""
            for bucket, count in zip(self._buckets, counts, strict=True):
                if count:
                    bucket.inc(count)
            self._sum.inc(total)

    return CountedHistogram


def _cells_of(classes: Sequence[str] | None, folder: Path) -> _Cells:
    """Give the cells of a version: its classes, or those its predictions were counted in when it was trained."""
    if classes:
        return _Cells(AnswerCells(labels=tuple(classes)), (*classes, "other"))
    edges: list[float] = []
    # A package of another release has no profile: its predictions are one cell.
    with contextlib.suppress(FileNotFoundError, KeyError, ValueError):
        profile = profile_from_json((folder / REFERENCE_PROFILE_FILE).read_text())
        edges = sorted(set(profile.layout.by_name[PREDICTION].edges.tolist()))
    step = math.ceil(len(edges) / (MAXIMUM_CELLS - 1)) if edges else 1
    kept = tuple(edges[::step])
    ends = ["-inf", *(f"{edge:.6g}" for edge in kept), "inf"]
    names = tuple(f"{low} to {high}" for low, high in pairwise(ends))
    return _Cells(AnswerCells(edges=kept), names)


def _forget_dead_workers() -> None:
    """Remove what workers that were killed left behind but their counts: what they had at hand, or served, is not there any more."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return
    for path in Path(folder).glob("gauge_live*_*.db"):  # whose readers know that they may go
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)
