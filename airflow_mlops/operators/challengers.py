"""Compare the champion with the newest models that were trained in the shadow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import MLOpsError, TransientError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.operators.base import StepOperator, check_key, dataset_ref, optional
from airflow_mlops.run_windows import RUN_WINDOW, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context

    from airflow_mlops.ledger import WindowGrade


#: Windows before this one that are looked at: those that wait for labels may be weeks of hours.
_LOOK_BACK = 1_000


class CompareChallengersOperator(StepOperator):
    """Hold the champion and each recipe's newest models side by side on a window that none of them has seen.

    The comparison goes into the ledger, where the retraining decision reads it: a recipe whose models keep beating the champion
    earns its next model a promotion. So are the champions of the past: where one of them does much better again, it may come back. A model belongs to a recipe when it was trained with ``recipe=...``.

    A window that ``CheckPerformanceOperator`` could not grade yet, as its labels are late, is skipped; a later run compares it.

    :param model_name: registered model. (templated)
    :param dataset: what holds inputs and target: an ingest or validation task's result, a dataset version or a table URI. (templated)
    :param as_of: with a table URI, read it as it was: a version number or an instant such as ``2024-03-01T00:00:00Z``. (templated)
    :param time_column: places a row in the window. (templated)
    :param target: column that was predicted; default the champion's. (templated)
    :param metric: whose loss per row is compared. (templated)
    :param window_start: first instant of the window; default the run's data interval. (templated)
    :param window_end: first instant after it. (templated)
    :param champion_alias: alias of the champion. (templated)
    """

    step = "challengers"
    needs = frozenset({"mlflow", "ledger"})
    template_fields: Sequence[str] = (
        "model_name",
        "dataset",
        "time_column",
        "target",
        "metric",
        "window_start",
        "window_end",
        "champion_alias",
        "as_of",
    )

    def __init__(
        self,
        *,
        model_name: str,
        dataset: Any,
        time_column: str,
        target: str | None = None,
        metric: str = "mae",
        window_start: str = RUN_WINDOW[0],
        window_end: str = RUN_WINDOW[1],
        champion_alias: str = "champion",
        as_of: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.as_of = as_of
        self.model_name = model_name
        self.dataset = dataset
        self.time_column = time_column
        self.target = target
        self.metric = metric
        self.window_start = window_start
        self.window_end = window_end
        self.champion_alias = champion_alias

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.challengers.ChallengersSpec`."""
        return {
            "dataset": dataset_ref(self.dataset, self.as_of),
            "model_name": self.model_name,
            "window": window_spec(self.window_start, self.window_end, context),
            "time_column": self.time_column,
            "target": optional(self.target),
            "metric": self.metric,
            "champion_alias": self.champion_alias,
            "earlier": self._former_champions(),
        }

    def _former_champions(self) -> list[str]:
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            return ledger.former_champions(self.model_name, alias=self.champion_alias)

    def execute(self, context: Context) -> dict[str, Any]:
        """Compare on the earlier windows that were graded since, then on this one; the result is about this one."""
        spec = self.build_spec(context)
        earlier, graded = self._graded(spec["window"])
        for window in earlier:
            try:
                self.record(self._runner.run(self.step, spec | {"window": window}, self.services()), context)
            except TransientError:
                raise
            except (MLOpsError, ValueError) as err:
                # Its rows are gone, its champion was deleted: no reason not to compare on this one.
                self.log.warning(
                    "challengers can't be compared on an earlier window, %s: %s", window["start"], err
                )
        if not graded:
            raise AirflowSkipException("the labels of this window are late: a later run compares on it")
        return self.record(self._runner.run(self.step, spec, self.services()), context)

    def _graded(self, current: dict[str, str] | None) -> tuple[list[dict[str, Any]], bool]:
        """List the earlier windows that were graded and not compared yet, and tell whether this one can be compared."""
        from airflow_mlops.core.codec import to_dict
        from airflow_mlops.ledger import EntryKind

        if current is None:
            return [], True
        window = Window.parse(**current)
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            undecided = {one for one in ledger.undecided_windows(self.model_name) if one.end <= window.start}
            grades = (
                ledger.grades(self.model_name, before=window.start, limit=_LOOK_BACK) if undecided else []
            )
            compared = {
                entry.window
                for entry in ledger.entries(
                    kind=EntryKind.CHALLENGER_CHECK, model_name=self.model_name, limit=len(grades) + 1
                )
            }
            own = ledger.grades(self.model_name, window=window)
        earlier = [
            to_dict(grade.window)
            for grade in grades
            if _is_settled(grade) and grade.window in undecided and grade.window not in compared
        ]
        return earlier, all(_is_settled(grade) for grade in own)

    def record(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write the comparison to the ledger.

        :returns: the one that stands: a window gets one.
        """
        from airflow_mlops.ledger import EntryKind

        standing = self.write_entry(
            context,
            kind=EntryKind.CHALLENGER_CHECK,
            key=check_key(result),
            model_name=result["model_name"],
            window=result["window"],
            subject=result["check"]["champion"] if result["check"] else None,
            summary=f"challengers of {result['model_name']}: {result['reason']}",
            payload=result,
        )
        return standing.payload


def _is_settled(grade: WindowGrade) -> bool:
    """Whether labels are here, or none are awaited: a champion that is new gave no answers to grade."""
    return grade.measured or not grade.entry.payload.get("awaits_labels", True)
