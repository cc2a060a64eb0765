"""What every operator of this package does: build the spec, run the step, record, decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator, timezone

from airflow_mlops.core.windows import Window
from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.hooks.mlflow import MLflowHook
from airflow_mlops.hooks.services import services_from_connections
from airflow_mlops.hooks.signing import SigningHook
from airflow_mlops.hooks.storage import stores_of
from airflow_mlops.runners.base import DeferringRunner
from airflow_mlops.runners.in_process import InProcessRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import BaseOperatorLink, Context

    from airflow_mlops.ledger import EntryKind, LedgerEntry, Recorded
    from airflow_mlops.runners.base import Runner
    from airflow_mlops.services import Services


class Recording:
    """What operators have in common that write to the ledger."""

    ledger_conn_id: str
    outlets: Any
    log: Any

    def write_entry(
        self,
        context: Context,
        *,
        kind: EntryKind,
        key: str,
        model_name: str | None,
        window: Mapping[str, Any] | None,
        summary: str,
        payload: Mapping[str, Any],
        subject: str | None = None,
    ) -> LedgerEntry:
        """Append one entry to the ledger and one line to the log.

        :returns: the entry that stands: the same key twice is one entry, the first.
        """
        from airflow_mlops.core.codec import from_dict
        from airflow_mlops.ledger import LedgerEntry

        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            recorded = ledger.record(
                LedgerEntry(
                    kind=kind,
                    key=key,
                    model_name=model_name,
                    window=from_dict(Window, window) if window is not None else None,
                    subject=subject,
                    summary=summary,
                    payload=dict(payload),
                    actor=actor(context),
                    recorded_at=timezone.utcnow(),
                )
            )
        self.log_recorded(recorded)
        return recorded.entry

    def log_recorded(self, recorded: Recorded) -> None:
        """Say in the log what was written, or who had written it before."""
        standing = recorded.entry
        if recorded.created:
            self.log.info("%s", standing.summary)
        else:
            self.log.info("in the ledger already, by %s: %s", standing.actor, standing.summary)

    def note_link(self, link: type[BaseOperatorLink], url: str) -> None:
        """Put an address behind one of the operator's links."""
        self.found_links = {**getattr(self, "found_links", {}), str(link.name): url}

    def fill_outlets(self, context: Context, facts: Mapping[str, Any]) -> None:
        """Put facts into the event of every asset the Dag author declared as outlet."""
        from airflow.sdk import Asset

        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["outlet_events"][outlet].extra["airflow_mlops"] = dict(facts)


class StepOperator(Recording, BaseOperator):
    """Run one step of the loop; the base of every operator here, and of yours.

    A subclass names the step, says how its arguments become the spec (:meth:`build_spec`), what goes into the ledger
    (:meth:`record`) and what the result means for the Dag (:meth:`decide`). Everything else is here.

    :param mlflow_conn_id: MLflow connection.
    :param bentoml_conn_id: connection of the model service.
    :param ledger_conn_id: connection of the ledger.
    :param signing_conn_id: connection with the keys packages are signed and verified with.
    :param runner: where the step runs; default this task's own process.
    :param storage_conn_ids: connections of object stores that the step reads from although no argument names them, such as
        that of the table a model version was trained on. Those in ``s3://conn_id@bucket/key`` are found without it.
    """

    #: Name of the step in :data:`airflow_mlops.steps.base.STEP_MODULES`.
    step: ClassVar[str]

    def __init__(
        self,
        *,
        mlflow_conn_id: str = MLflowHook.default_conn_name,
        bentoml_conn_id: str = BentoMLHook.default_conn_name,
        ledger_conn_id: str = LedgerHook.default_conn_name,
        signing_conn_id: str = SigningHook.default_conn_name,
        runner: Runner | None = None,
        storage_conn_ids: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.mlflow_conn_id = mlflow_conn_id
        self.bentoml_conn_id = bentoml_conn_id
        self.ledger_conn_id = ledger_conn_id
        self.signing_conn_id = signing_conn_id
        self.runner = runner
        self.storage_conn_ids = storage_conn_ids

    #: Which of the connections ``mlflow``, ``bentoml`` and ``ledger`` the step needs; the others may be undefined. ``signing``
    #: is for steps that sign; public keys go to every step that reads from MLflow.
    needs: ClassVar[frozenset[str]] = frozenset()

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the step, write down what it saw, then let :meth:`decide` return, skip or raise."""
        spec = self.build_spec(context)
        services = self.services()
        connections = services.connections | stores_of(spec, self.storage_conn_ids)
        result = self._runner.run(self.step, spec, replace(services, connections=connections))
        return self._conclude(result, context)

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> dict[str, Any]:
        """Go on where a runner that waits in the triggerer deferred the task.

        :raises TypeError: when the Dag has another runner by now.
        """
        runner = self._runner
        if not isinstance(runner, DeferringRunner):
            raise TypeError(
                f"task {self.task_id!r} was deferred by another runner than {type(runner).__name__}: clear it to run it anew"
            )
        return self._conclude(runner.resume(event), context)

    def _conclude(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        return self.decide(self.record(result, context) or result, context)

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Turn the rendered arguments into the step's spec (JSON)."""
        raise TypeError(
            f"{type(self).__name__} must say how its arguments become the spec of step {self.step!r}"
        )

    def record(self, result: dict[str, Any], context: Context) -> dict[str, Any] | None:
        """Write to the ledger, the log, the links and the asset events what the step found.

        :returns: the result to go on with where the ledger already holds another; by default the step's own.
        """

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Return the XCom value, raise :class:`~airflow_mlops.exceptions.GateFailedError`, or skip what follows."""
        return result

    def on_kill(self) -> None:
        """End what the runner started."""
        self._runner.cancel()

    def services(self) -> Services:
        """Resolve the connections this step needs."""
        return services_from_connections(
            mlflow_conn_id=self.mlflow_conn_id if "mlflow" in self.needs else None,
            bentoml_conn_id=self.bentoml_conn_id if "bentoml" in self.needs else None,
            ledger_conn_id=self.ledger_conn_id if "ledger" in self.needs else None,
            signing_conn_id=self.signing_conn_id if "mlflow" in self.needs else None,
            may_sign="signing" in self.needs,
        )

    @property
    def _runner(self) -> Runner:
        if self.runner is None:
            self.runner = InProcessRunner()
        return self.runner


def actor(context: Context) -> str:
    """Name the task instance in the ledger's words: Dag, run, task."""
    instance = context["ti"]
    return f"{instance.dag_id}/{instance.run_id}/{instance.task_id}"


def instance_of(context: Context) -> str:
    """Name whom something belongs to while it is under way: a mapped task is as many as it has instances."""
    index = getattr(context["ti"], "map_index", -1)
    return f"{actor(context)}/{index}" if index is not None and index >= 0 else actor(context)


def optional(value: Any) -> Any:
    """Give a value, or none: a template of nothing renders to ``None``, an empty text or "None"."""
    return None if value in (None, "", "None") else value


def optional_text(value: Any) -> str | None:
    """Give a value as text, as rendering may have made it a number; none as :func:`optional` does."""
    return None if optional(value) is None else str(value)


def optional_number(value: Any) -> float | None:
    """Read a number that may have been rendered to text; none as :func:`optional` does."""
    return None if optional(value) is None else float(value)


def names(value: str | Sequence[str]) -> list[str]:
    """Read a list of names that may have been given as one comma-separated text."""
    return (
        [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else list(value)
    )


def check_key(result: Mapping[str, Any]) -> str:
    """Give the ledger key of a check: one per model and window."""
    from airflow_mlops.core.codec import from_dict

    return f"{result['model_name']}|{from_dict(Window, result['window']).key}"


def dataset_ref(dataset: Any, as_of: Any) -> Any:
    """Give a dataset argument as a step takes it.

    :param dataset: a former task's result, a dataset version, or a table URI.
    :param as_of: with a table URI: the version number or the instant that is meant; default the newest version.
    :raises ValueError: ``as_of`` with what is a version already.
    """
    dataset = part_of(dataset, "dataset")
    if optional(as_of) is None:
        return dataset
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"as_of {as_of!r} of what is version {dataset.get('version')} of {dataset.get('uri')} already: give the table's URI with it"
        )
    return {"uri": dataset, "as_of": as_of.isoformat() if isinstance(as_of, datetime) else str(as_of)}


def part_of(value: Any, part: str) -> Any:
    """Take a part out of a former task's result; anything else is the part itself."""
    return value[part] if isinstance(value, Mapping) and part in value else value
