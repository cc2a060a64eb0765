"""The observer: it counts what each version does during a rollout, off the request path, into a file per worker."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from airflow_mlops.core.codec import canonical_json, from_dict, to_dict
from airflow_mlops.core.profiles.profile_format import PREDICTION, REFERENCE_PROFILE_FILE, profile_from_json
from airflow_mlops.core.rollouts.drawn_requests import REFUSED, DrawnRequests, draw_requests, merge_drawn
from airflow_mlops.core.rollouts.observations import (
    AnswerCells,
    Observations,
    VersionObservations,
    count_times,
    draw_answers,
    merge_observations,
    time_cells,
)
from airflow_mlops.serving.callers import Callers
from airflow_mlops.serving.files import write_whole
from airflow_mlops.serving.in_flight import InFlight, forget_all
from airflow_mlops.serving.sizes import ROW_BYTES, VALUE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from airflow_mlops.core.rollouts.desired_state import DesiredState
    from airflow_mlops.serving.reconciler import Routes

logger = logging.getLogger(__name__)

OBSERVED_FOLDER = "observed"

#: Events held between two flushes at most, and bytes of their answers, about; what comes on top is not counted, for no version.
MAXIMUM_EVENTS = 200_000
MAXIMUM_BYTES = 128_000_000

#: How often the requests that were drawn from callers are written at most: up to half a megabyte, where everything else is a few kilobytes.
WRITE_DRAWN_SECONDS = 5.0


_NOTHING = contextlib.nullcontext()


class _Event(NamedTuple):
    """One request, as one version answered it.

    :param revision: of the state under which it was asked.
    :param caller: its sticky key, where callers stay with their version.
    :param seconds: it took; ``None`` where it failed.
    :param answers: one per row; ``None`` where it failed.
    :param returned: what was answered instead, where this was a mirror's answer.
    :param refused: whether it was drawn for the version, and refused for what the caller sent.
    """

    version: str
    revision: int
    caller: bytes | None
    seconds: float | None
    answers: Sequence[Any] | None
    returned: Sequence[Any] | None
    refused: bool = False


class Observer:
    """Count, while a rollout is under way; otherwise do nothing.

    A crash loses at most what came since the last flush; while callers are drawn, of :data:`WRITE_DRAWN_SECONDS`.

    :param serving_dir: serving folder.
    :param callers: gives digests of sticky keys.
    """

    def __init__(self, serving_dir: Path, callers: Callers | None = None) -> None:
        self.folder = serving_dir / OBSERVED_FOLDER
        self.serving_dir = serving_dir
        self.callers = callers or Callers(self.folder)
        #: Whether there is anything to count: who serves asks first, as most of the time there is not.
        self.active = False
        self._seen = Observations(revision=0)
        self._events: list[_Event] = []
        self._bytes = 0
        self._shed = 0
        self._unwritten, self._written_at = False, -math.inf
        self._random = np.random.default_rng()
        self._flushing = threading.Lock()
        self._in_flight: InFlight | None = None

    def begin(self, routes: Routes) -> None:
        """Count from now on for new routes: from nothing, where they are a new state; no more, where nobody steers."""
        self.flush()
        with self._flushing:
            state = routes.state
            if state.revision != self._seen.revision:
                self._seen = Observations(
                    revision=state.revision,
                    cells=_answer_cells(self.serving_dir, routes),
                    versions={one.model_version: VersionObservations() for one in state.versions},
                    drawn=DrawnRequests(versions=tuple(one.model_version for one in state.versions))
                    if state.sticky
                    else None,
                )
                self._remove_older()
                self._note_in_flight(state)
            self._seen = replace(self._seen, fell_back=routes.fell_back)
            self.active = state.leased
            self._events, self._bytes = [], 0
            if state.leased or routes.fell_back:
                self._write()

    def computing(self, version: str) -> AbstractContextManager[None]:
        """Note that a version computes an answer, so that it is known should the worker not survive it."""
        return self._in_flight.computing(version) if self._in_flight is not None else _NOTHING

    def answered(
        self, version: str, revision: int, seconds: float, answers: Sequence[Any], caller: bytes | None = None
    ) -> None:
        """Note a request that a version answered."""
        self._note(_Event(version, revision, caller, seconds, answers, None))

    def failed(self, version: str, revision: int, caller: bytes | None = None) -> None:
        """Note a request that a version failed on."""
        self._note(_Event(version, revision, caller, None, None, None))

    def refused(self, version: str, revision: int, caller: bytes | None = None) -> None:
        """Note a request that was drawn for a version and refused, for what the caller sent: it counts in the split alone."""
        self._note(_Event(version, revision, caller, None, None, None, refused=True))

    def mirrored(
        self,
        version: str,
        revision: int,
        seconds: float,
        answers: Sequence[Any] | None,
        returned: Sequence[Any],
    ) -> None:
        """Note a mirror's answer beside the one that was returned; ``None`` where it failed."""
        self._note(_Event(version, revision, None, seconds, answers, returned))

    def shed(self) -> None:
        """Note a request that the mirror had no time for."""
        self._shed += 1

    def flush(self) -> None:
        """Add up what came in, and write it."""
        with self._flushing:
            self._add_up()
            if self._unwritten:
                self._write()

    def flush_when_due(self) -> None:
        """Add up what came in, and write it, unless drawn requests were written a moment ago."""
        with self._flushing:
            self._add_up()
            rests = self._seen.drawn is not None and time.monotonic() < self._written_at + WRITE_DRAWN_SECONDS
            if self._unwritten and not rests:
                self._write()

    def read(self) -> Observations:
        """Add up what all workers saw of the present state."""
        self.flush()
        with self._flushing:
            own = self._seen
        others = []
        for path in self.folder.glob(f"{own.revision}-*.json"):
            if path.name != self._file:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    others.append(from_dict(Observations, json.loads(path.read_text())))
        died = self._in_flight.died() if self._in_flight is not None else []
        return replace(merge_observations([own, *others]), died=tuple(died))

    @property
    def _file(self) -> str:
        return f"{self._seen.revision}-{os.getpid()}.json"

    def _note(self, event: _Event) -> None:
        # A request that was routed by a former state tells nothing of how this one splits them.
        if not self.active or event.revision != self._seen.revision:
            return
        # Whoever comes when all is full is left out, large or small: otherwise small requests would be counted more often.
        if len(self._events) < MAXIMUM_EVENTS and self._bytes < MAXIMUM_BYTES:
            self._events.append(event)
            self._bytes += ROW_BYTES + VALUE_BYTES * (len(event.answers or ()) + len(event.returned or ()))

    def _add_up(self) -> None:
        events, self._events, self._bytes = self._events, [], 0
        if events or self._shed:
            self._add(events)
            self._unwritten = True

    def _add(self, events: list[_Event]) -> None:
        versions, drawn = dict(self._seen.versions), self._seen.drawn
        for name in {event.version for event in events}:
            mine = [event for event in events if event.version == name]
            counted = _count(mine, self._seen.cells, self._random)
            versions[name] = versions.get(name, VersionObservations()) + counted
        if drawn is not None and events:
            drawn = merge_drawn([drawn, self._draw(events, drawn.versions)])
        shed, self._shed = self._shed, 0
        self._seen = replace(self._seen, versions=versions, drawn=drawn, shed=self._seen.shed + shed)

    def _draw(self, events: list[_Event], versions: tuple[str, ...]) -> DrawnRequests:
        """Draw one request of each caller; one without a key is a caller of its own, as it is sent to a version by lot."""
        numbers = {name: number for number, name in enumerate(versions)}
        callers = self._random.integers(0, 2**64, size=len(events), dtype=np.uint64)
        for row, event in enumerate(events):
            if event.caller:
                callers[row] = self.callers.number(event.revision, event.caller)
        times, answers = np.full(len(events), -1), np.full(len(events), -1)
        answered = [row for row, event in enumerate(events) if event.answers is not None]
        times[answered] = time_cells([events[row].seconds or 0.0 for row in answered])
        drawn = draw_answers((events[row].answers or () for row in answered), self._random)
        answers[answered] = self._seen.cells.of(drawn)
        times[[row for row, event in enumerate(events) if event.refused]] = REFUSED
        return draw_requests(
            versions=versions,
            answered_by=np.array([numbers[event.version] for event in events]),
            callers=callers,
            times=times,
            answers=answers,
            random=self._random,
        )

    def _write(self) -> None:
        self._unwritten, self._written_at = False, time.monotonic()
        try:
            self.folder.mkdir(exist_ok=True)
            write_whole(self.folder / self._file, canonical_json(to_dict(self._seen)).encode())
        except OSError:  # serving goes on: who steers finds no data, which is never a pass
            logger.exception("what was observed can't be written")

    def _note_in_flight(self, state: DesiredState) -> None:
        if not state.leased or state.rollout is None:
            self._in_flight = None
            forget_all(self.folder)
            return
        try:
            names = tuple(one.model_version for one in state.versions)
            if self._in_flight is None or not self._in_flight.is_of(state.rollout, names):
                self._in_flight = InFlight(self.folder, state.rollout, names)
                self._in_flight.forget_others()
        except OSError:  # serving goes on
            self._in_flight = None
            logger.exception("what is being computed can't be noted")

    def _remove_older(self) -> None:
        self.callers.forget(self._seen.revision)
        for path in self.folder.glob("*-*.json"):
            revision = path.name.partition("-")[0]
            if revision.isdigit() and int(revision) < self._seen.revision:
                path.unlink(missing_ok=True)


def _count(events: list[_Event], cells: AnswerCells, random: np.random.Generator) -> VersionObservations:
    """Count what one version did."""
    answered = [event for event in events if event.answers is not None]
    answers = [answer for event in answered for answer in event.answers or ()]
    pairs = [
        pair
        for event in answered
        if event.returned is not None
        for pair in zip(event.answers or (), event.returned, strict=True)
    ]
    times = [event.seconds for event in answered if event.seconds is not None]
    drawn = draw_answers((event.answers or () for event in answered), random)
    sums = (0.0, 0.0)
    if answers and not cells.labels:
        numbers = np.asarray(answers, dtype=np.float64)
        sums = (float(numbers.sum()), float((numbers**2).sum()))
    refused = sum(event.refused for event in events)
    return VersionObservations(
        requests=len(events) - refused,
        failed=len(events) - refused - len(answered),
        refused=refused,
        rows=len(answers),
        times=tuple(count_times(times).tolist()) if times else (),
        answers=tuple(cells.counts(drawn).tolist()) if drawn else (),
        sums=sums,
        pairs=len(pairs),
        differing=sum(own != other for own, other in pairs),
        absolute_difference=0.0 if cells.labels else float(sum(abs(own - other) for own, other in pairs)),
    )


def _answer_cells(serving_dir: Path, routes: Routes) -> AnswerCells:
    """Count answers as the stable version's training counted them, so that all versions are counted alike."""
    manifest = routes.stable.model.manifest
    if manifest.task == "classification":
        return AnswerCells(labels=manifest.classes or ())
    folder = serving_dir / routes.state.folder(routes.state.stable)
    try:
        profile = profile_from_json((folder / REFERENCE_PROFILE_FILE).read_text())
        return AnswerCells(edges=tuple(profile.layout.by_name[PREDICTION].edges.tolist()))
    except (
        FileNotFoundError,
        KeyError,
        ValueError,
    ):  # a package of another release: its answers are not compared
        return AnswerCells()
