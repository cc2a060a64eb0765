"""Deploy a model version's Bento to BentoCloud."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_mlops.hooks.bentocloud import BentoCloudHook
from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.hooks.signing import SigningHook
from airflow_mlops.links import EndpointLink
from airflow_mlops.operators.elsewhere import OF_BENTO, DeployingElsewhere

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context


class DeployToBentoCloudOperator(DeployingElsewhere, BaseOperator):
    """Push a version's Bento to BentoCloud, make a deployment serve it, and see it answer; what served before is put back when it does not.

    BentoCloud builds the image. Token and signing keys of the service go into one of its secrets. The task is done when the service
    itself says that it serves the version. A retry finds what is there already and goes on. A retraining whose version serves now is
    closed in the ledger.

    As on Kubernetes, both versions answer while replicas are replaced, in no asked proportion.

    :param bento: what the build task returned. (templated)
    :param settings: fields of :class:`~airflow_mlops.integrations.bentocloud.CloudEndpoint` that differ from its defaults, such as
        ``{"maximum": 3, "instance_type": "cpu.2"}``. (templated)
    :param poll_seconds: how often the deployment is looked at. (templated)
    :param bentocloud_conn_id: connection of BentoCloud.
    :param closes_retraining: whether a retraining ends with this deployment: set it to ``False`` for every endpoint but the one the
        retrained model is meant for.
    :param bentoml_conn_id: connection whose password is the token that requests must bring.
    :param ledger_conn_id: connection of the ledger.
    :param signing_conn_id: connection with the public keys that the service verifies its package with.
    """

    operator_extra_links = (EndpointLink(),)
    template_fields: Sequence[str] = ("bento", "settings", "poll_seconds")

    def __init__(
        self,
        *,
        bento: Any,
        settings: Mapping[str, Any] | None = None,
        poll_seconds: float | str = 10.0,
        bentocloud_conn_id: str = BentoCloudHook.default_conn_name,
        closes_retraining: bool = True,
        bentoml_conn_id: str = BentoMLHook.default_conn_name,
        ledger_conn_id: str = LedgerHook.default_conn_name,
        signing_conn_id: str = SigningHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bento = bento
        self.settings = settings
        self.poll_seconds = poll_seconds
        self.bentocloud_conn_id = bentocloud_conn_id
        self.closes_retraining = closes_retraining
        self.bentoml_conn_id = bentoml_conn_id
        self.ledger_conn_id = ledger_conn_id
        self.signing_conn_id = signing_conn_id

    def execute(self, context: Context) -> dict[str, Any]:
        """Push, deploy, wait, write down what serves; fail when it is not the new version."""
        from airflow_mlops.core.codec import to_dict
        from airflow_mlops.integrations.bentocloud import CloudEndpoint, fetched
        from airflow_mlops.integrations.bentocloud_rollout import roll_out
        from airflow_mlops.integrations.kubernetes_manifests import secret_name

        variables = self.variables()
        ours = {name: self.bento[name] for name in (*OF_BENTO, "tag")}
        ours["secret"] = secret_name(self.bento["model_name"], variables) if variables else None
        endpoint = self.endpoint_of(CloudEndpoint, self.settings, ours)
        with (
            contextlib.closing(
                BentoCloudHook(bentocloud_conn_id=self.bentocloud_conn_id).get_conn()
            ) as cloud,
            tempfile.TemporaryDirectory(prefix="bentocloud-") as folder,
        ):
            done = roll_out(
                cloud,
                endpoint,
                fetched(self.bento, Path(folder)),
                variables=variables,
                poll_seconds=float(self.poll_seconds),
            )
        result = {
            "model_name": endpoint.model_name,
            "model_version": endpoint.model_version,
            "package_digest": endpoint.package_digest,
            "deployment": endpoint.deployment,
            "bento": endpoint.tag,
            "strategy": "bentocloud",
            **to_dict(done),
        }
        return self.conclude(result, context)
