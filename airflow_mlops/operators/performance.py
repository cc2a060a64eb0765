"""Check a model's realized performance."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow.sdk import timezone

from airflow_mlops.core.comparison.grades import is_news, labelled_count, labels_changed
from airflow_mlops.core.figures import figures
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import MLOpsError, TransientError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.operators.base import StepOperator, actor, check_key, dataset_ref, names
from airflow_mlops.run_windows import RUN_WINDOW, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context

    from airflow_mlops.ledger import Ledger, LedgerEntry, WindowGrade


#: Windows to grade again from which on it pays to ask first which of them got labels.
_WORTH_A_LOOK = 3


#: What a grade says of the earlier windows that its run went through; with more failures than these it says nothing.
_LOOKED_BACK, _MOST_FAILED = "looked_back", 100


class CheckPerformanceOperator(StepOperator):
    """Join a window's predictions with their labels and compare with what was promised at training.

    A finding does not fail the task: it goes into the ledger, where the retraining decision reads it. So does a window
    that has too few labels yet, with an estimate that needs none; later runs grade it, and grade it again when more labels
    came, until all are here or the time for them is over.

    :param model_name: model whose inference log is read. (templated)
    :param labels: what holds the labels: an ingest or validation task's result, a dataset version or a table URI; ``None``: there
        are none, performance is estimated. (templated)
    :param labels_as_of: with a table URI of labels, read it as it was: a version number or an instant such as
        ``2024-03-01T00:00:00Z``. (templated)
    :param id_column: column of the labels that equals the prediction id. (templated)
    :param target: label column. (templated)
    :param metric: name of a built-in metric, or import path of one; what the model was trained for. (templated)
    :param metrics: more of them that are reported beside it, such as what a mistake costs. (templated)
    :param window_start: first instant of the window; default the run's data interval. (templated)
    :param window_end: first instant after it. (templated)
    :param maximum_relative_change: worsening that is tolerated, 0.2 is twenty percent. (templated)
    :param minimum_labelled_share: below it nothing is judged, in ``[0, 1]``. (templated)
    :param maximum_invalid_share: share of labelled rows whose label or answer may be infinite or no number: they are left out and
        named, with more of them the window is not measured. (templated)
    :param maturity_days: how long, from a window's first check on, labels that are late still change its grade. (templated)
    :param tolerated_level_change: worsening of the level over several windows that is tolerated. (templated)
    :param false_alarm_rate: of the search for a lasting change, per window. (templated)
    """

    step = "performance"
    needs = frozenset({"mlflow", "bentoml", "ledger"})
    template_fields: Sequence[str] = (
        "model_name",
        "labels",
        "id_column",
        "target",
        "metric",
        "metrics",
        "window_start",
        "window_end",
        "maximum_relative_change",
        "minimum_labelled_share",
        "maximum_invalid_share",
        "maturity_days",
        "tolerated_level_change",
        "false_alarm_rate",
        "labels_as_of",
    )

    def __init__(
        self,
        *,
        model_name: str,
        labels: Any = None,
        id_column: str = "",
        target: str = "label",
        metric: str = "mae",
        metrics: str | Sequence[str] = (),
        window_start: str = RUN_WINDOW[0],
        window_end: str = RUN_WINDOW[1],
        maximum_relative_change: float | str = 0.2,
        minimum_labelled_share: float | str = 0.8,
        maximum_invalid_share: float | str = 0.05,
        maturity_days: float | str = 90.0,
        tolerated_level_change: float | str = 0.05,
        false_alarm_rate: float | str = 0.002,
        labels_as_of: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.labels_as_of = labels_as_of
        self.model_name = model_name
        self.labels = labels
        self.id_column = id_column
        self.target = target
        self.metric = metric
        self.metrics = metrics
        self.window_start = window_start
        self.window_end = window_end
        self.maximum_relative_change = maximum_relative_change
        self.minimum_labelled_share = minimum_labelled_share
        self.maximum_invalid_share = maximum_invalid_share
        self.maturity_days = maturity_days
        self.tolerated_level_change = tolerated_level_change
        self.false_alarm_rate = false_alarm_rate

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.performance.PerformanceSpec`."""
        return {
            "model_name": self.model_name,
            "window": window_spec(self.window_start, self.window_end, context),
            "labels": dataset_ref(self.labels, self.labels_as_of),
            "id_column": self.id_column,
            "target": self.target,
            "metric": self.metric,
            "metrics": names(self.metrics),
            "policy": {
                "maximum_relative_change": float(self.maximum_relative_change),
                "minimum_labelled_share": float(self.minimum_labelled_share),
                "maximum_invalid_share": float(self.maximum_invalid_share),
                "maturity_days": float(self.maturity_days),
                "change": {
                    "tolerated_share": float(self.tolerated_level_change),
                    "false_alarm_rate": float(self.false_alarm_rate),
                },
            },
        }

    def execute(self, context: Context) -> dict[str, Any]:
        """Grade the earlier windows whose labels were late, then this one; the result is about this one.

        An earlier window that can't be graded is logged, and costs the others nothing.
        """
        spec = self.build_spec(context)
        position, late_ones = self._unfinished(spec["window"])
        unchanged, spec["labels"] = self._unchanged(late_ones, spec)
        failed: list[Window] = []
        for late in late_ones:
            if not late.due and (
                late.window in unchanged or _version_of(spec.get("labels")) in late.looked_at
            ):
                continue
            try:
                result = self._grade(spec | late.spec)
            except TransientError:
                raise
            except (MLOpsError, ValueError) as err:
                # Its version was deleted, its labels contradict each other: no reason not to grade this one.
                self.log.warning("an earlier window, %s, can't be graded: %s", late.window, err)
                failed.append(late.window)
            else:
                self._write(result, context)
                spec["labels"] = result.get("labels") or spec["labels"]  # all windows by the same version
        result = self._grade(spec)
        result |= {_LOOKED_BACK: _looked_back(position, result.get("labels"), failed)}
        return self.decide(self.record(result, context), context)

    def _unchanged(self, late_ones: Sequence[_Late], spec: Mapping[str, Any]) -> tuple[set[Window], Any]:
        """Tell the windows whose grades rest on all labels of theirs that there are: there may be thousands of an hour each.

        Of one that is not measured yet the estimate may count by now, and one that is due gets its last grade.

        :returns: them, and the version of the labels that tells.
        """
        labels = spec["labels"]
        if labels is None or len(late_ones) < _WORTH_A_LOOK:
            return set(), labels
        uri = labels["uri"] if isinstance(labels, Mapping) else labels
        looked_at = [
            {"window": late.spec["window"], "version": known[0], "known_at": known[1].isoformat()}
            for late in late_ones
            if late.measured and not late.due and (known := late.newest_of(uri)) is not None
        ]
        if not looked_at:
            return set(), labels
        asked = {name: spec[name] for name in ("model_name", "labels", "id_column", "target")} | {
            "windows": looked_at
        }
        try:
            found = self._runner.run("new-labels", asked, self.services())
        except TransientError:
            raise
        except (MLOpsError, ValueError) as err:  # what is wrong is told by the grade of this window
            self.log.warning("which windows got labels can't be told, so all are graded again: %s", err)
            return set(), labels
        if found["unchanged"]:
            self.log.info(
                "%d of %d earlier windows got no labels: they are not graded again",
                len(found["unchanged"]),
                len(late_ones),
            )
        return {Window.parse(**window) for window in found["unchanged"]}, found["labels"]

    def record(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write the grade to the ledger.

        :returns: the grade that stands.
        """
        grade = self._write(result, context)
        facts = {name: grade[name] for name in ("window", "measured", "degraded", "reason")}
        self.fill_outlets(context, facts)
        return grade

    def _grade(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Run the step with what the ledger knows of this window and of earlier ones."""
        window = Window.parse(**spec["window"]) if spec["window"] else None
        if window is not None:
            with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
                past = ledger.grades(self.model_name, before=window.start, measured=True)
                own = next(iter(ledger.grades(self.model_name, window=window)), None)
                version = self._who_answered(ledger, window, own.entry if own is not None else None)
            first = own.first_checked_at if own is not None else timezone.utcnow()
            spec = (
                {"model_version": version}
                | spec
                | {
                    # Losses of another metric are in other units: beside them every level looks like a change.
                    "past": [
                        _past_grade(grade) for grade in past if grade.entry.payload["metric"] == self.metric
                    ],
                    "waited_days": (timezone.utcnow() - first) / timedelta(days=1),
                }
            )
        return self._runner.run(self.step, spec, self.services())

    def _write(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write a grade, and again when it rests on more labels; before the first one, what is missing for it.

        Whoever is overtaken holds his grade against the one that was written meanwhile. Grades only gain labels, so this ends.
        """
        from airflow_mlops.core.codec import from_dict

        window = from_dict(Window, result["window"])
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            while True:
                checked = next(iter(ledger.grades(self.model_name, window=window)), None)
                if checked is not None and not is_news(checked.entry.payload, result):
                    return checked.entry.payload
                standing = checked.entry if checked is not None and checked.measured else None
                recorded = ledger.record_grade(
                    self._entry(ledger, checked, result, context), standing=standing
                )
                if recorded is not None:
                    self.log_recorded(recorded)
                    return recorded.entry.payload

    def _entry(
        self, ledger: Ledger, checked: WindowGrade | None, result: dict[str, Any], context: Context
    ) -> LedgerEntry:
        """Give a grade as it is written beside the one that stands."""
        from airflow_mlops.core.codec import from_dict
        from airflow_mlops.ledger import EntryKind, LedgerEntry

        key = check_key(result)
        late = "|final" if result["final"] else ""
        if checked is not None and checked.measured:
            standing = checked.entry
            decided = ledger.find(EntryKind.RETRAINING_DECISION, key)
            result = graded_again(standing, result, decided.payload.get("outcome") if decided else None)
            key += f"|{labelled_count(result)} labelled{late}"
            if labels_changed(standing.payload, result):
                key += f"|labels {result['labels']['version']}"
        elif not result["measured"]:
            key += f"|version {result['model_version']}|{labelled_count(result)} labelled{late}"
            if checked is not None:  # news beside the same labels, such as another estimate
                key += f"|after {checked.entry.entry_id}"
        return LedgerEntry(
            kind=EntryKind.PERFORMANCE_CHECK,
            key=key,
            model_name=result["model_name"],
            window=from_dict(Window, result["window"]),
            subject=result["model_version"],
            summary=f"performance of {result['model_name']}: {result['reason']}",
            payload=result,
            actor=actor(context),
            recorded_at=timezone.utcnow(),
        )

    def _unfinished(self, current: dict[str, str] | None) -> tuple[int, list[_Late]]:
        """Give the ledger's position, and the earlier windows that await labels as of that, oldest first."""
        from airflow_mlops.ledger import EntryKind

        if current is None:
            return 0, []
        start, now = Window.parse(**current).start, timezone.utcnow()
        maturity = timedelta(days=float(self.maturity_days))
        kinds = [EntryKind.PERFORMANCE_CHECK]
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            position = next((entry.entry_id or 0 for entry in ledger.entries(limit=1)), 0)
            ungraded = ledger.ungraded_windows(self.model_name, before=start)
            looks = ledger.checks_of(self.model_name, ungraded, kinds)
            checked = {window: (look.checks[0], look.first_checked_at) for window, look in looks.items()}
            for grade in ledger.unfinished_grades(
                self.model_name, before=start, checked_after=now - 2 * maturity
            ):
                checked[grade.window] = (grade.entry, grade.first_checked_at)
            newest = next(iter(ledger.grades(self.model_name, before=start, limit=1)), None)
            found = []
            for window in sorted({*ungraded, *checked}):
                check, first = checked.get(window, (None, now))
                found.append(
                    _Late(
                        window=window,
                        model_version=self._who_answered(ledger, window, check),
                        looked_at=_looked_at(check, newest.entry if newest else None),
                        measured=bool(check is not None and check.payload.get("measured")),
                        due=first <= now - maturity,
                    )
                )
        return position, found

    def _who_answered(self, ledger: Ledger, window: Window, check: LedgerEntry | None) -> str | None:
        """Give the version whose answers are graded, also when another one is champion by now; ``None``: the champion of today."""
        if check is not None and check.payload.get("answer_count", 1):
            return check.subject
        return ledger.champion_at(self.model_name, window.end)


class _Late(NamedTuple):
    """An earlier window that awaits labels.

    :param model_version: whose answers are graded; ``None``: the champion's of today.
    :param looked_at: versions of the labels that it has been graded by already, and when.
    :param measured: whether it has a grade by labels.
    :param due: whether the time for its labels is over, so that its last grade is to come.
    """

    window: Window
    model_version: str | None
    looked_at: Mapping[tuple[str, int], datetime]
    measured: bool
    due: bool

    def newest_of(self, uri: str) -> tuple[int, datetime] | None:
        """Give the newest version of a table by which it has been graded, and when that was."""
        return max(
            ((version, at) for (table, version), at in self.looked_at.items() if table == uri), default=None
        )

    @property
    def spec(self) -> dict[str, Any]:
        """What differs in the spec."""
        from airflow_mlops.core.codec import to_dict

        return {"window": to_dict(self.window), "model_version": self.model_version}


def _looked_back(position: int, labels: Any, failed: Sequence[Window]) -> dict[str, Any] | None:
    """Say which earlier windows a run has graded by which labels: those the ledger had at its position, but for the failed ones."""
    from airflow_mlops.core.codec import to_dict

    version = _version_of(labels)
    if version is None or len(failed) > _MOST_FAILED:
        return None
    return {
        "position": position,
        "uri": version[0],
        "version": version[1],
        "failed": [to_dict(window) for window in failed],
    }


def _looked_at(check: LedgerEntry | None, newest: LedgerEntry | None) -> dict[tuple[str, int], datetime]:
    """Give the versions of the labels by which a window was looked at: for its own check, and by the run that graded the newest one."""
    if check is None:
        return {}
    found = {}
    own = _version_of(check.payload.get("labels"))
    if own is not None:
        found[own] = check.recorded_at
    told = newest.payload.get(_LOOKED_BACK) if newest is not None else None
    if newest is None or not told or check.window is None or newest.window is None:
        return found
    was_there = check.window.end <= newest.window.start and (check.entry_id or 0) <= told["position"]
    if was_there and check.window not in {Window.parse(**window) for window in told["failed"]}:
        found[told["uri"], told["version"]] = newest.recorded_at
    return found


def _version_of(labels: Any) -> tuple[str, int] | None:
    """Name the version of a table of labels; ``None``: not known, as of a table whose newest one is meant."""
    if not isinstance(labels, Mapping) or labels.get("version") is None:
        return None
    return str(labels["uri"]), int(labels["version"])


def graded_again(before: LedgerEntry, result: dict[str, Any], decision: str | None) -> dict[str, Any]:
    """Say what a second grade changes. A decision taken on the first stands; that it would be another one is said."""
    was, now = before.payload, result["labelled_share"]
    flipped = was["degraded"] != result["degraded"]
    before_it, _ = figures(was["value"], result["value"])
    reason = (
        f"{result['reason']}; graded again with {now:.0%} of the labels, it was {before_it} with "
        f"{was['labelled_share']:.0%}"
    )
    if flipped:
        verdicts = {True: "degraded", False: "not degraded"}
        reason += f": the verdict turned from {verdicts[was['degraded']]} to {verdicts[result['degraded']]}"
        if decision:
            reason += f", and the decision taken on it ({decision}) stands"
    return result | {"reason": reason, "supersedes": before.key, "flipped": flipped}


def _past_grade(grade: WindowGrade) -> dict[str, Any]:
    """Give a grade as :class:`~airflow_mlops.core.monitoring.performance.PastGrade`; older ones lack some fields."""
    from airflow_mlops.core.codec import to_dict

    payload = grade.entry.payload
    fields = ("loss_mean", "loss_deviation", "effective_rows", "estimated_value", "estimate_interval")
    return {
        "window": to_dict(grade.window),
        "model_version": payload["model_version"],
        "degraded": payload["degraded"],
        "value": payload["value"],
        **{name: payload.get(name) for name in fields},
    }
