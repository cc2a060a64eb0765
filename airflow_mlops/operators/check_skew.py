"""Hold what a service is asked against the contract of the data its model was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow_mlops.exceptions import DataQualityError
from airflow_mlops.operators.base import StepOperator, instance_of, names, optional, part_of
from airflow_mlops.run_windows import RUN_WINDOW, window_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context

ACTIONS = ("gate", "warn")


class CheckSkewOperator(StepOperator):
    """Judge a window of the inference log: by what the model's package declares, by the training data's suite, by the same rows.

    A drift check says whether requests are distributed otherwise; this one says which requests break the contract, and where the
    service computes an input otherwise than the training table. See :doc:`/how-to/skew`.

    :param model_name: registered model. (templated)
    :param suite: path of the training data's Great Expectations suite, or the suite as a dict; what it says of columns that are no inputs
        is left out, and named. (templated)
    :param table: what a task returned, dataset version or table URI that holds the rows the service was asked about, as training sees
        them; given, values are compared row by row. (templated)
    :param id_column: its column that equals the prediction id; needed with ``table``. (templated)
    :param champion_alias: alias of the version whose package declares the inputs. (templated)
    :param window_start: first instant of the window; default the run's data interval. (templated)
    :param window_end: first instant after it. (templated)
    :param action: ``gate`` fails the task where a critical expectation fails; ``warn`` only records the verdict.
    :param share: share of the requests that may be unlike the training rows (out of range, null, of an unseen category), in
        ``[0, 1)``; a rule of thumb. Four standard errors are added, as of few requests some are by chance. (templated)
    :param tolerance: difference of two numbers that is none, in proportion to the larger one. (templated)
    :param different_share: share of the compared rows in which an input may differ from the table, in ``[0, 1)``; a rule of
        thumb, for rows that were corrected afterwards. (templated)
    :param private_columns: inputs whose values neither log, ledger, XCom nor error show; with ``id_column`` or ``prediction_id`` among them
        no row is named. A list, or names separated by commas. (templated)
    """

    step = "skew"
    needs: ClassVar[frozenset[str]] = frozenset({"mlflow", "bentoml", "ledger"})
    template_fields: Sequence[str] = (
        "model_name",
        "suite",
        "table",
        "id_column",
        "champion_alias",
        "window_start",
        "window_end",
        "share",
        "tolerance",
        "different_share",
        "private_columns",
    )

    def __init__(
        self,
        *,
        model_name: str,
        suite: str | Mapping[str, Any] | None = None,
        table: Any = None,
        id_column: str | None = None,
        champion_alias: str = "champion",
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        action: Literal["gate", "warn"] = "gate",
        share: float = 0.01,
        tolerance: float = 1e-6,
        different_share: float = 0.001,
        private_columns: str | Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.suite = suite
        self.table = table
        self.id_column = id_column
        self.champion_alias = champion_alias
        self.window_start = window_start
        self.window_end = window_end
        self.action = action
        self.share = share
        self.tolerance = tolerance
        self.different_share = different_share
        self.private_columns = private_columns

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.skew.SkewSpec`.

        :raises ValueError: when ``action`` is unknown.
        """
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action!r}; known: {', '.join(ACTIONS)}")
        return {
            "model_name": self.model_name,
            "window": window_spec(self.window_start, self.window_end, context),
            "champion_alias": self.champion_alias,
            "suite": self.suite or None,
            "share": float(self.share),
            "table": part_of(self.table, "dataset") or None,
            "id_column": optional(self.id_column),
            "tolerance": float(self.tolerance),
            "different_share": float(self.different_share),
            "private_columns": names(self.private_columns),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the verdict to the ledger, the log and the outlets' events."""
        from airflow_mlops.core.checks.verdict import draw_failures
        from airflow_mlops.ledger import EntryKind

        self.write_entry(
            context,
            kind=EntryKind.SKEW_CHECK,
            key=f"{result['model_name']}|{result['window']['start']}|{instance_of(context)}|{context['ti'].try_number}",
            model_name=result["model_name"],
            window=result["window"],
            summary=f"skew of {result['model_name']}: {result['headline']}",
            payload=result,
        )
        if result["failures"]:
            self.log.info("expectations that failed:\n%s", draw_failures(result["failures"]))
        facts = {name: result[name] for name in ("window", "success", "headline")}
        self.fill_outlets(context, facts)

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Pass on the verdict, or stop.

        :raises DataQualityError: a critical expectation failed and ``action`` is ``gate``.
        """
        if not result["success"] and self.action == "gate":
            raise DataQualityError(
                f"{result['headline']}. Correct what the service is sent, or train on data like it if that is right",
                evidence={"failures": result["failures"], "differences": result["differences"]},
            )
        return result
