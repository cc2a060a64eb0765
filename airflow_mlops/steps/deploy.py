"""Deploy: a registered version becomes the one that the local BentoML service answers with, at once or step by step."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from airflow_mlops.core.rollouts.canary import CanaryPolicy
from airflow_mlops.core.rollouts.desired_state import ServedVersion
from airflow_mlops.core.rollouts.rollout import Strategy, plan_rollout
from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.integrations.bentoml import LocalServer
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import Ledger
from airflow_mlops.serving.local import LocalEndpoint, deploy_package
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.registry.aliases import resolve_alias
from airflow_mlops.steps.rollouts.history import version_of_request
from airflow_mlops.steps.rollouts.quality import QualitySpec
from airflow_mlops.steps.rollouts.rollout import Rollout, rollout_name
from airflow_mlops.steps.rollouts.spec import RolloutSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_mlops.services import Services

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploySpec:
    """What to deploy, and how.

    :param model_name: registered model.
    :param model_version: version number; ``None`` takes the one ``alias`` points at.
    :param alias: see ``model_version``.
    :param package_digest: of the version, where it is known: a rollout that is under way needs no MLflow then.
    :param strategy: see :func:`~airflow_mlops.core.rollouts.rollout.plan_rollout`, as the next four.
    :param shares: of the phases.
    :param phase_seconds: of each phase.
    :param looks: in each phase.
    :param patience: times its length that a phase is waited for when there is no data.
    :param policy: what is tolerated of the new version.
    :param quality: labels to judge it by.
    :param lease_seconds: how long shares hold when nobody says that he steers; above 0, at most 3600.
    :param rollout: names this rollout; whoever comes with the same name goes on with it.
    :param actor: who deploys.
    :param request: names the run of a task that asks: its retries come with the same one, a task that was cleared with another. A version
        that a look had taken back is not tried again by a retry.
    :param abort: roll back the rollout of this name instead, for this reason.
    :param first_serves: let the version serve at once, whatever the strategy, where nothing is served that it could be compared with.
    :param own_log: let the service's inference log stay in its serving folder, whatever the worker's variables say.
    :param timeout_seconds: how long the service may take to answer with the new version.
    """

    model_name: str
    model_version: str | None = None
    alias: str = "champion"
    package_digest: str | None = None
    strategy: Strategy = "recreate"
    shares: tuple[float, ...] = (0.05, 0.25, 0.5)
    phase_seconds: float = 600.0
    looks: int = 2
    patience: float = 3.0
    policy: CanaryPolicy = field(default_factory=CanaryPolicy)
    quality: QualitySpec | None = None
    lease_seconds: float = 60.0
    rollout: str = ""
    actor: str = ""
    request: str = ""
    abort: str | None = None
    first_serves: bool = False
    own_log: bool = False
    timeout_seconds: float = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployResult:
    """What serves now.

    :param model_version: the version that was to be deployed.
    :param serving_version: the version that answers, or answers most safely while a rollout is under way.
    :param deployment_uid: name of the serving folder: one that was lost and made again has another.
    :param state: ``serving``: it is through. ``waiting``: a rollout is under way. ``rolled_back``: what served before serves.
    :param wait_seconds: until one has to look again; ``None`` when it has ended.
    :param restore_seconds: that it took to serve what had served before, where it was rolled back.
    :param worse: what the new version did worse, by name, where that decided.
    :param reason: what decided, a sentence.
    """

    model_name: str
    model_version: str
    serving_version: str
    previous_version: str | None
    endpoint_url: str
    package_digest: str
    deployment_uid: str
    revision: int
    seconds: float
    started: bool
    strategy: Strategy = "recreate"
    state: Literal["serving", "waiting", "rolled_back"] = "serving"
    wait_seconds: float | None = None
    restore_seconds: float | None = None
    worse: tuple[str, ...] = ()
    reason: str = ""


def run(spec: DeploySpec, services: Services) -> DeployResult:
    """Replace the served version, or go one step further in doing so; the old one answers until the new one has proved itself.

    :raises RolloutError: the new version did not come up, or another rollout is under way; says what serves now.
    :raises ValueError: a plan that makes no sense.
    :raises ModelVersionNotFoundError: no such version or alias.
    """
    endpoint = _endpoint(spec, services)
    with tempfile.TemporaryDirectory() as temporary:

        def fetch() -> Path:
            registry = Registry.connect(services)
            return registry.download_version(
                registry.version(spec.model_name, new.model_version), Path(temporary)
            )

        new = _version(spec, services, endpoint)
        if spec.strategy != "recreate":
            return _roll_out(spec, services, endpoint, new, fetch)

        def note(err: Exception) -> None:
            _note_refusal(spec, services, endpoint, new, err)

        deployment = deploy_package(endpoint, fetch(), spec.model_name, new, on_refusal=note)
    return DeployResult(
        model_name=spec.model_name,
        model_version=new.model_version,
        serving_version=new.model_version,
        previous_version=deployment.previous_version,
        endpoint_url=endpoint.server.url,
        package_digest=new.package_digest,
        deployment_uid=endpoint.uid,
        revision=deployment.revision,
        seconds=deployment.seconds,
        started=deployment.started,
    )


def _version(spec: DeploySpec, services: Services, endpoint: LocalEndpoint) -> ServedVersion:
    if spec.model_version and spec.package_digest:
        return ServedVersion(model_version=spec.model_version, package_digest=spec.package_digest)
    registry = Registry.connect(services)
    asked = spec.model_version or _version_so_far(spec, services, endpoint)
    version = (
        registry.version(spec.model_name, asked)
        if asked
        else resolve_alias(registry, services, spec.model_name, spec.alias)
    )
    return ServedVersion(model_version=version.model_version, package_digest=version.package_digest)


def _version_so_far(spec: DeploySpec, services: Services, endpoint: LocalEndpoint) -> str | None:
    """Give the version that a former try has begun to roll out."""
    if spec.strategy == "recreate" or not spec.request:
        return None
    with Ledger.open(services.require("ledger_url")) as ledger:
        return version_of_request(
            ledger,
            name=rollout_name(spec.rollout, endpoint),
            model_name=spec.model_name,
            request=spec.request,
        )


def _endpoint(spec: DeploySpec, services: Services) -> LocalEndpoint:
    url = urlsplit(services.require("endpoint_url"))
    if url.hostname is None or url.port is None:
        raise ConnectionConfigError(
            f"endpoint {services.endpoint_url!r} needs a host and a port to start a service on"
        )
    server = LocalServer(
        Path(services.require("serving_dir")),
        host=url.hostname,
        port=url.port,
        token=services.endpoint_token,
        steering_token=services.steering_token,
        public_keys=services.signing_public_keys,
    )
    return LocalEndpoint(server, timeout_seconds=spec.timeout_seconds, own_log=spec.own_log)


def _roll_out(
    spec: DeploySpec,
    services: Services,
    endpoint: LocalEndpoint,
    new: ServedVersion,
    fetch: Callable[[], Path],
) -> DeployResult:
    started = time.monotonic()
    if spec.strategy == "ab" and spec.quality is None:
        raise ValueError("an A/B test is decided by labels: give quality, or choose strategy='canary'")
    with Ledger.open(services.require("ledger_url")) as ledger:
        progress = _rollout(spec, endpoint, ledger, new, fetch).advance()
    desired, status = progress.desired, progress.state.status
    return DeployResult(
        model_name=spec.model_name,
        model_version=new.model_version,
        serving_version=desired.stable.model_version,
        previous_version=desired.previous_version,
        endpoint_url=endpoint.server.url,
        package_digest=new.package_digest,
        deployment_uid=endpoint.uid,
        revision=desired.revision,
        seconds=time.monotonic() - started,
        started=progress.started,
        strategy=spec.strategy,
        state="rolled_back" if status == "rolled_back" else "serving" if status == "finished" else "waiting",
        wait_seconds=progress.wait_seconds,
        restore_seconds=progress.restore_seconds,
        worse=progress.worse,
        reason=progress.state.reason,
    )


def _note_refusal(
    spec: DeploySpec, services: Services, endpoint: LocalEndpoint, new: ServedVersion, err: Exception
) -> None:
    """Write down why a version does not serve; whoever asked for it sees that first, with or without a ledger."""
    if services.ledger_url is None:
        return
    try:
        with Ledger.open(services.ledger_url) as ledger:
            _rollout(spec, endpoint, ledger, new, Path).note_refusal(err)
    except Exception:  # a plan that makes no sense, or no ledger, must not hide it
        log.exception("that version %s could not be deployed can't be written down", new.model_version)


def _rollout(
    spec: DeploySpec,
    endpoint: LocalEndpoint,
    ledger: Ledger,
    new: ServedVersion,
    fetch: Callable[[], Path],
) -> Rollout:
    plan = plan_rollout(
        spec.strategy,
        shares=spec.shares,
        seconds=spec.phase_seconds,
        looks=spec.looks,
        patience=spec.patience,
    )
    how = RolloutSpec(
        name=spec.rollout or f"{spec.model_name}/{new.model_version}",
        plan=plan,
        policy=spec.policy,
        quality=spec.quality,
        lease_seconds=spec.lease_seconds,
        actor=spec.actor or "deploy",
        request=spec.request,
        abort=spec.abort,
        first_serves=spec.first_serves,
    )
    return Rollout(how, endpoint, ledger, model_name=spec.model_name, new=new, fetch=fetch)


STEP = Step(name="deploy", spec=DeploySpec, result=DeployResult, run=run)
