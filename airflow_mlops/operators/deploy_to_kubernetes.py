"""Deploy a model version's image to a Kubernetes cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.hooks.signing import SigningHook
from airflow_mlops.links import EndpointLink
from airflow_mlops.operators.base import instance_of
from airflow_mlops.operators.elsewhere import OF_BENTO, DeployingElsewhere

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context


class DeployToKubernetesOperator(DeployingElsewhere, BaseOperator):
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
    :param closes_retraining: whether a retraining ends with this deployment: set it to ``False`` for every endpoint but the one the
        retrained model is meant for.
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
        closes_retraining: bool = True,
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
        self.closes_retraining = closes_retraining
        self.bentoml_conn_id = bentoml_conn_id
        self.ledger_conn_id = ledger_conn_id
        self.signing_conn_id = signing_conn_id

    def execute(self, context: Context) -> dict[str, Any]:
        """Apply, wait, write down what serves; fail when it is not the new version."""
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook

        from airflow_mlops.core.codec import to_dict
        from airflow_mlops.integrations.kubernetes_cluster import Cluster
        from airflow_mlops.integrations.kubernetes_manifests import KubernetesEndpoint, secret_of
        from airflow_mlops.integrations.kubernetes_rollout import roll_out

        hook = KubernetesHook(conn_id=self.kubernetes_conn_id)
        namespace = self.namespace or hook.get_namespace() or "default"
        variables = self.variables()
        secret = secret_of(namespace, self.bento["model_name"], variables) if variables else None
        ours = {name: self.bento[name] for name in OF_BENTO}
        ours |= {"image": self.image, "namespace": namespace, "variables": sorted(variables)}
        ours["secret"] = secret["metadata"]["name"] if secret else None
        endpoint = self.endpoint_of(KubernetesEndpoint, self.settings, ours)
        done = roll_out(
            Cluster(hook.get_conn(), namespace, self.kubernetes_conn_id),
            endpoint,
            actor=instance_of(context),
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
        return self.conclude(result, context)
