"""Deploy a model version's image to a Kubernetes cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, timezone

from airflow_mlops.exceptions import RolloutError
from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.hooks.services import services_from_connections
from airflow_mlops.hooks.signing import SigningHook
from airflow_mlops.links import EndpointLink
from airflow_mlops.operators.base import Recording, actor
from airflow_mlops.operators.deploy import close_retraining

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context

    from airflow_mlops.integrations.kubernetes_manifests import KubernetesEndpoint
    from airflow_mlops.services import Services


class DeployToKubernetesOperator(Recording, BaseOperator):
    """Make a Deployment serve a version's image, and see it ready; what served before is put back when it does not become so.

    The old pods answer until new ones are ready. A Service, an autoscaler and a disruption budget go with the Deployment; token and
    signing keys into a secret. It talks to the cluster from the task itself, not from a runner, and asks for the rights of
    ``deploy/kubernetes/deploy-role.yaml``. A retry goes on where the task was. A retraining whose version serves now is closed in
    the ledger.

    It is no strategy of :class:`~airflow_mlops.operators.deploy.DeployModelOperator`, because shares of traffic are not a
    Service's to give: both versions answer while pods are replaced, in no asked proportion.

    :param bento: what the build task returned: which version the image serves. (templated)
    :param image: that was built from the Bento, in a registry the cluster pulls from; a digest or a tag that never moves. (templated)
    :param settings: fields of :class:`~airflow_mlops.integrations.kubernetes_manifests.KubernetesEndpoint` that differ from its
        defaults, such as ``{"minimum": 3, "cpu": "2"}``. (templated)
    :param namespace: default the connection's, else ``default``. (templated)
    :param poll_seconds: how often the Deployment is looked at. (templated)
    :param kubernetes_conn_id: how to reach the cluster.
    :param bentoml_conn_id: connection of the endpoint; its password is the token that requests must bring.
    :param ledger_conn_id: connection of the ledger.
    :param signing_conn_id: connection with the public keys that the service verifies its package with.
    """

    operator_extra_links = (EndpointLink(),)
    template_fields: Sequence[str] = ("bento", "image", "settings", "namespace", "poll_seconds")

    def __init__(
        self,
        *,
        bento: Any,
        image: str,
        settings: Mapping[str, Any] | None = None,
        namespace: str | None = None,
        poll_seconds: float | str = 2.0,
        kubernetes_conn_id: str = "kubernetes_default",
        bentoml_conn_id: str = BentoMLHook.default_conn_name,
        ledger_conn_id: str = LedgerHook.default_conn_name,
        signing_conn_id: str = SigningHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bento = bento
        self.image = image
        self.settings = settings
        self.namespace = namespace
        self.poll_seconds = poll_seconds
        self.kubernetes_conn_id = kubernetes_conn_id
        self.bentoml_conn_id = bentoml_conn_id
        self.ledger_conn_id = ledger_conn_id
        self.signing_conn_id = signing_conn_id

    def execute(self, context: Context) -> dict[str, Any]:
        """Apply, wait, write down what serves; fail when it is not the new version."""
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook

        from airflow_mlops.core.codec import to_dict
        from airflow_mlops.integrations.kubernetes_deploy import Cluster, roll_out
        from airflow_mlops.integrations.kubernetes_manifests import secret_of

        hook = KubernetesHook(conn_id=self.kubernetes_conn_id)
        namespace = self.namespace or hook.get_namespace() or "default"
        variables = _variables(
            services_from_connections(
                bentoml_conn_id=self.bentoml_conn_id, signing_conn_id=self.signing_conn_id
            )
        )
        secret = secret_of(namespace, self.bento["model_name"], variables) if variables else None
        endpoint = self._endpoint(namespace, secret, sorted(variables))
        done = roll_out(
            Cluster(hook.get_conn(), namespace, self.kubernetes_conn_id),
            endpoint,
            actor=actor(context),
            secret=secret,
            poll_seconds=float(self.poll_seconds),
        )
        result = {
            "model_name": endpoint.model_name,
            "model_version": endpoint.model_version,
            "endpoint_url": endpoint.url,
            "package_digest": endpoint.package_digest,
            "namespace": namespace,
            "deployment": endpoint.name,
            "image": endpoint.image,
            "strategy": "kubernetes",
            **to_dict(done),
        }
        self._record(result, context)
        if done.state == "rolled_back":
            raise RolloutError(f"{done.reason}. Version {done.serving_version} serves, as before")
        close_retraining(self, result, context)
        return result

    def on_kill(self) -> None:
        """Stop: what is under way is put back on the way out."""
        raise RolloutError("the task was killed")

    def _endpoint(
        self, namespace: str, secret: Mapping[str, Any] | None, variables: list[str]
    ) -> KubernetesEndpoint:
        from airflow_mlops.core.codec import from_dict, unknown_fields
        from airflow_mlops.integrations.kubernetes_manifests import KubernetesEndpoint

        settings = dict(self.settings or {})
        ours = {name: self.bento[name] for name in ("model_name", "model_version", "package_digest")}
        ours |= {"image": self.image, "namespace": namespace, "variables": variables}
        ours["secret"] = secret["metadata"]["name"] if secret else None
        wrong = [*unknown_fields(KubernetesEndpoint, settings), *(name for name in settings if name in ours)]
        if wrong:
            raise ValueError(
                f"settings can't say {', '.join(wrong)}; see KubernetesEndpoint for what they can"
            )
        return from_dict(KubernetesEndpoint, settings | ours)

    def _record(self, result: Mapping[str, Any], context: Context) -> None:
        """Write what serves now to the ledger and link to the service."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(EndpointLink, result["endpoint_url"])
        name, version = result["model_name"], result["model_version"]
        about = {"model_name": name, "window": None, "subject": version}
        if result["state"] == "serving":
            self.write_entry(
                context,
                kind=EntryKind.DEPLOYMENT,
                key=f"{result['endpoint_url']}|{name}|{result['revision']}|{result['package_digest']}",
                summary=f"{result['endpoint_url']} serves {name} version {version} after {result['seconds']:.1f} s",
                payload=result,
                **about,
            )
            return
        # As a rollout's own entries are: its readers know those.
        event = {"number": 1, "what": "rolled_back", "phase": 0, "revision": result["revision"]}
        event |= {"at": timezone.utcnow().isoformat(), "seconds": result["restore_seconds"]}
        rollout = {"rollout": actor(context), "attempt": 1, "strategy": "kubernetes"}
        self.write_entry(
            context,
            kind=EntryKind.ROLLOUT,
            key=f"{result['endpoint_url']}|{name}|{result['revision']}|{result['package_digest']}|rolled_back",
            summary=f"{result['reason']}; version {result['serving_version']} serves again after "
            f"{result['restore_seconds']:.1f} s",
            payload=rollout
            | {"endpoint": result["endpoint_url"], "event": event | {"reason": result["reason"]}},
            **about,
        )


def _variables(services: Services) -> dict[str, str]:
    """Give what the service reads from its environment and nobody else may."""
    given = services.to_environment()
    names = ("AIRFLOW_MLOPS_ENDPOINT_TOKEN", "AIRFLOW_MLOPS_SIGNING_PUBLIC_KEYS")
    return {name: given[name] for name in names if name in given}
