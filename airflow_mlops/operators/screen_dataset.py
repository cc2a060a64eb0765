"""Screen the labels of a new partition against trusted partitions, before anything learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlops.exceptions import InsufficientDataError, PartitionHeldError
from airflow_mlops.operators.base import StepOperator, names, optional_text, part_of
from airflow_mlops.operators.dataset import RecordingDatasets
from airflow_mlops.run_windows import RUN_WINDOW, run_time_zone, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context

ACTIONS = ("gate", "warn", "quarantine")


class ScreenDatasetOperator(RecordingDatasets, StepOperator):
    """Hold a partition whose labels contradict its features more often than those of trusted partitions do, or look overwritten.

    The windows before the new one, as long as it is by the calendar of the Dag's time zone, are trusted, but for those that were held. See :doc:`/how-to/screen-for-poisoning`.

    :param dataset: what an ingest or validation task returned, a dataset version, or a table URI for its newest; the outlets' events tell
        a validation's ``airflow.dataquality.result`` on. (templated)
    :param target: column of the label: classes (text, truth values, at most 20 whole numbers) or numbers. (templated)
    :param time_column: column that places a row in a window. (templated)
    :param features: columns the label is to be explained by, as a list or comma-separated; default all but target, time and id. (templated)
    :param window_start: first instant of the new partition; default the run's data interval. (templated)
    :param window_end: first instant after it. (templated)
    :param id_column: names rows in the evidence. (templated)
    :param action: what a held partition means: ``gate`` fails the task; ``warn`` only records the verdict; ``quarantine`` moves the
        partition to another table, and what follows goes on with the version without it.
    :param skip_held: skip this task, and what follows, where ``quarantine`` has moved the partition: its outlets send no event, as there
        is no new data. By default both go on with the version without it.
    :param policy: fields of :class:`~airflow_mlops.core.checks.poisoning.PoisoningPolicy`, such as ``{"false_alarm_rate": 0.1}``. (templated)
    :param allow_undecided: let a partition in of which nothing can be told, such as one of the first of a table; by default the
        task fails, as not measured is not fine. ``warn`` never fails.
    :param quarantine_table: URI of the Delta table held partitions are moved to; default the dataset's with ``_held`` behind. (templated)
    :param released_by: name of a person who has looked and lets the partition in, whatever the screen says; empty: nobody. It
        is written to the ledger. (templated)
    :param private_columns: columns whose values neither log, ledger, XCom nor error show: no slice is named by one, and as ``id_column`` it
        names no row. A list, or names separated by commas. (templated)
    """

    step = "screen"
    needs: ClassVar[frozenset[str]] = frozenset({"ledger"})
    template_fields: Sequence[str] = (
        "dataset",
        "target",
        "time_column",
        "features",
        "window_start",
        "window_end",
        "id_column",
        "policy",
        "quarantine_table",
        "released_by",
        "private_columns",
    )

    def __init__(
        self,
        *,
        dataset: Any,
        target: str,
        time_column: str,
        features: str | Sequence[str] = (),
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        id_column: str | None = None,
        action: Literal["gate", "warn", "quarantine"] = "gate",
        skip_held: bool = False,
        policy: Mapping[str, Any] | None = None,
        allow_undecided: bool = False,
        quarantine_table: str | None = None,
        released_by: str | None = None,
        private_columns: str | Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dataset = dataset
        self.target = target
        self.time_column = time_column
        self.features = features
        self.window_start = window_start
        self.window_end = window_end
        self.id_column = id_column
        self.action = action
        self.skip_held = skip_held
        self.policy = policy
        self.allow_undecided = allow_undecided
        self.quarantine_table = quarantine_table
        self.released_by = released_by
        self.private_columns = private_columns

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.screen.ScreenSpec`.

        :raises ValueError: when ``action`` is unknown, or there is no window.
        """
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action!r}; known: {', '.join(ACTIONS)}")
        window = window_spec(self.window_start, self.window_end, context)
        if window is None:
            raise ValueError("a screen needs a window: give window_start and window_end")
        dataset = part_of(self.dataset, "dataset")
        place = self.quarantine_table or f"{part_of(dataset, 'uri').rstrip('/')}_held"
        return {
            "dataset": dataset,
            "window": window,
            "time_zone": run_time_zone(context),
            "time_column": self.time_column,
            "target": self.target,
            "features": names(self.features),
            "id_column": self.id_column,
            "policy": dict(self.policy or {}),
            "quarantine": place if self.action == "quarantine" else None,
            "released_by": optional_text(self.released_by),
            "private_columns": names(self.private_columns),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the verdict to the ledger, the log and the outlets' events, and the new version where the partition was set aside."""
        from airflow_mlops.ledger import EntryKind

        dataset = result["dataset"]
        if result["quarantine"] is not None:
            self.write_version(
                result,
                context,
                summary=f"the partition went to {result['quarantine']['uri']}, version {dataset['version']} is without it",
                payload={"dataset": dataset, "window": result["window"], "row_count": 0},
            )
        released = f", released by {result['released_by']}" if result["released_by"] else ""
        self.write_verdict(
            result,
            context,
            kind=EntryKind.SCREENING,
            summary=f"{result['verdict']}{released}: {result['headline']}"[:1000],
        )
        for item in result["slices"]:
            self.log.info(
                "in %(where)s: a share of %(share).3f of the labels of %(row_count)d rows is contradicted, %(trusted_share).3f in trusted ones",
                item,
            )
        facts = {name: result[name] for name in ("dataset", "verdict", "released_by")}
        self.fill_outlets(context, facts)
        if isinstance(self.dataset, Mapping) and "quality" in self.dataset:
            self.tell_quality(context, self.dataset["quality"])

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Let the partition in, or stop.

        :raises AirflowSkipException: it was moved to the quarantine, and ``skip_held``.
        :raises PartitionHeldError: it is held, nobody released it, and ``action`` is ``gate``.
        :raises InsufficientDataError: nothing can be told of it, and neither ``warn`` nor ``allow_undecided`` nor a person lets it in.
        """
        if self.action == "warn" or result["released_by"] or result["verdict"] == "enters":
            return result
        if result["verdict"] == "undecided":
            if self.allow_undecided:
                return result
            raise InsufficientDataError(
                f"{result['headline']}. Set allow_undecided for a table that is too young, or released_by after somebody has looked"
            )
        if result["quarantine"] is not None:
            if self.skip_held:
                raise AirflowSkipException(f"{result['headline']}; nothing new goes on")
            return result
        raise PartitionHeldError(
            f"{result['headline']}. Look at the rows, correct and ingest them again, or name who lets them in as released_by",
            evidence={
                name: result[name]
                for name in ("noise", "relation", "labels", "slices", "suspicious_rows", "dataset")
            },
        )
