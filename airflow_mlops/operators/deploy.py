"""Deploy a model version to the model service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.links import EndpointLink
from airflow_mlops.operators.base import StepOperator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class DeployModelOperator(StepOperator):
    """Make the local BentoML service answer with a version; it is started when it does not run.

    The old version answers until the new one is loaded, verified and warm; if that fails, it goes on answering.
    A retraining whose version serves now is closed in the ledger.

    :param model_name: registered model. (templated)
    :param model_version: version number; default the one ``alias`` points at. (templated)
    :param alias: see ``model_version``. (templated)
    :param strategy: ``recreate``: all traffic at once.
    :param timeout_seconds: how long the service may take to answer with the new version. (templated)
    """

    step = "deploy"
    needs = frozenset({"mlflow", "bentoml"})
    operator_extra_links = (EndpointLink(),)
    template_fields: Sequence[str] = ("model_name", "model_version", "alias", "timeout_seconds")

    def __init__(
        self,
        *,
        model_name: str,
        model_version: str | None = None,
        alias: str = "champion",
        strategy: Literal["recreate"] = "recreate",
        timeout_seconds: float | str = 120.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.model_version = model_version
        self.alias = alias
        self.strategy = strategy
        self.timeout_seconds = timeout_seconds

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.deploy.DeploySpec`."""
        return {
            "model_name": self.model_name,
            "model_version": str(self.model_version) if self.model_version else None,
            "alias": self.alias,
            "timeout_seconds": float(self.timeout_seconds),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write what serves now to the ledger and link to the service."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(EndpointLink, result["endpoint_url"])
        self.write_entry(
            context,
            kind=EntryKind.DEPLOYMENT,
            key=f"{result['endpoint_url']}|{result['model_name']}|{result['revision']}|{result['package_digest']}",
            model_name=result["model_name"],
            window=None,
            subject=result["model_version"],
            summary=f"{result['endpoint_url']} serves {result['model_name']} version {result['model_version']} "
            f"after {result['seconds']:.1f} s",
            payload=result,
        )
        self._close_retraining(result, context)

    def _close_retraining(self, result: dict[str, Any], context: Context) -> None:
        """Write the outcome of the retraining that this version was promoted for: it serves."""
        from airflow_mlops.ledger import EntryKind

        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            opened = ledger.open_retraining(result["model_name"])
            promotion = ledger.promotion_for(opened) if opened else None
        if opened is None or promotion is None or promotion.subject != result["model_version"]:
            return
        self.write_entry(
            context,
            kind=EntryKind.RETRAINING_OUTCOME,
            key=opened.key,
            model_name=result["model_name"],
            window=None,
            subject=result["model_version"],
            summary=f"the retraining of {result['model_name']} ended: version {result['model_version']} serves",
            payload={
                "outcome": "promoted",
                "model_version": result["model_version"],
                "reason": promotion.payload["reason"],
            },
        )
