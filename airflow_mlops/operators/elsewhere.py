"""What operators have in common that deploy to somewhere else than the task's machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from airflow.sdk import timezone

from airflow_mlops.exceptions import RolloutError, RolloutInterruptedError
from airflow_mlops.hooks.services import services_from_connections
from airflow_mlops.links import EndpointLink
from airflow_mlops.operators.base import Recording, instance_of
from airflow_mlops.operators.deploy import close_retraining

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk import Context

Endpoint = TypeVar("Endpoint")

#: Fields of the build task's output that say what is deployed.
OF_BENTO = ("model_name", "model_version", "package_digest")


class DeployingElsewhere(Recording):
    """Fill in what a target needs, and write down what became of it."""

    bentoml_conn_id: str
    signing_conn_id: str
    closes_retraining: bool

    def on_kill(self) -> None:
        """Stop: what is under way is put back on the way out."""
        raise RolloutInterruptedError("the task was killed")

    def variables(self) -> dict[str, str]:
        """Give what the service reads from its environment and nobody else may."""
        given = services_from_connections(
            bentoml_conn_id=self.bentoml_conn_id, signing_conn_id=self.signing_conn_id
        ).to_environment()
        names = ("AIRFLOW_MLOPS_ENDPOINT_TOKEN", "AIRFLOW_MLOPS_SIGNING_PUBLIC_KEYS")
        return {name: given[name] for name in names if name in given}

    def endpoint_of(
        self, kind: type[Endpoint], settings: Mapping[str, Any] | None, ours: Mapping[str, Any]
    ) -> Endpoint:
        """Fill in an endpoint's fields.

        :param settings: of the Dag author.
        :param ours: that the Dag author can't say.
        """
        from airflow_mlops.core.codec import from_dict, unknown_fields

        given = dict(settings or {})
        wrong = [*unknown_fields(kind, given), *(name for name in given if name in ours)]
        if wrong:
            raise ValueError(f"settings can't say {', '.join(wrong)}; see {kind.__name__} for what they can")
        return from_dict(kind, given | dict(ours))

    def conclude(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write down what serves now; fail when it is not the new version.

        :param result: of the rollout, with the fields of both targets.
        """
        self._record(result, context)
        if result["state"] == "rolled_back":
            raise RolloutError(f"{result['reason']}. Version {result['serving_version']} serves, as before")
        if self.closes_retraining:
            close_retraining(self, result, context)
        return result

    def _record(self, result: Mapping[str, Any], context: Context) -> None:
        """Write what serves now to the ledger and link to the service."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(EndpointLink, result["endpoint_url"])
        name, version = result["model_name"], result["model_version"]
        # A revision alone is counted from 1 again where a deployment is made anew, or in another cluster.
        state = f"{result['deployment_uid']}|{result['revision']}"
        key = f"{result['endpoint_url']}|{name}|{state}|{result['package_digest']}"
        about = {"model_name": name, "window": None, "subject": version}
        if result["state"] == "serving":
            self.write_entry(
                context,
                kind=EntryKind.DEPLOYMENT,
                key=key,
                summary=f"{result['endpoint_url']} serves {name} version {version} after {result['seconds']:.1f} s",
                payload=result,
                **about,
            )
            return
        # As a rollout's own entries are: its readers know those.
        event = {"number": 1, "what": "rolled_back", "phase": 0, "revision": result["revision"]}
        event |= {"at": timezone.utcnow().isoformat(), "seconds": result["restore_seconds"]}
        rollout = {"rollout": instance_of(context), "attempt": 1, "strategy": result["strategy"]}
        self.write_entry(
            context,
            kind=EntryKind.ROLLOUT,
            key=f"{key}|rolled_back",
            summary=f"{result['reason']}; version {result['serving_version']} serves again after "
            f"{result['restore_seconds']:.1f} s",
            payload=rollout
            | {"endpoint": result["endpoint_url"], "event": event | {"reason": result["reason"]}},
            **about,
        )
