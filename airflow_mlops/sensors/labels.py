"""Wait for labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.run_windows import RUN_WINDOW
from airflow_mlops.sensors.base import WindowSensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class LabelsArrivedSensor(WindowSensor):
    """Wait until enough of a window's predictions have a label: as in its grade those count that the champion gave.

    The champion is who was it when the window ended; where the ledger does not know, or it gave no answers, those of all versions count.

    :param model_name: model whose inference log is read. (templated)
    :param labels: URI of the table that holds the labels. (templated)
    :param id_column: column of the labels that equals the prediction id. (templated)
    :param target: label column. (templated)
    :param window_start: first instant of the window; default the run's data interval, or what its partition key names. (templated)
    :param window_end: first instant after it. (templated)
    :param minimum_labelled_share: how many have to have one, in ``[0, 1]``. (templated)
    :param bentoml_conn_id: connection of the model service, whose folder holds the log.
    :param ledger_conn_id: connection of the ledger, which knows the champion.
    """

    poll = "airflow_mlops.sensors.polls:labels_arrived"
    template_fields: Sequence[str] = (
        "model_name",
        "labels",
        "id_column",
        "target",
        "window_start",
        "window_end",
        "minimum_labelled_share",
    )

    def __init__(
        self,
        *,
        model_name: str,
        labels: str,
        id_column: str,
        target: str,
        window_start: str = RUN_WINDOW[0],
        window_end: str = RUN_WINDOW[1],
        minimum_labelled_share: float | str = 0.8,
        bentoml_conn_id: str = BentoMLHook.default_conn_name,
        ledger_conn_id: str = LedgerHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.labels = labels
        self.id_column = id_column
        self.target = target
        self.window_start = window_start
        self.window_end = window_end
        self.minimum_labelled_share = minimum_labelled_share
        self.bentoml_conn_id = bentoml_conn_id
        self.ledger_conn_id = ledger_conn_id

    def poll_arguments(self) -> dict[str, Any]:
        """Give the arguments of :func:`~airflow_mlops.sensors.polls.labels_arrived`."""
        return {
            "model_name": self.model_name,
            "labels": self.labels,
            "id_column": self.id_column,
            "target": self.target,
            "window_start": str(self.window_start),
            "window_end": str(self.window_end),
            "minimum_labelled_share": float(self.minimum_labelled_share),
            "bentoml_conn_id": self.bentoml_conn_id,
            "ledger_conn_id": self.ledger_conn_id,
        }
