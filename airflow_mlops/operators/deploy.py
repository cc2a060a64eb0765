"""Deploy a model version to the model service."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from airflow.sdk import conf

from airflow_mlops.exceptions import (
    EndpointUnavailableError,
    PromotionConflictError,
    RolloutInterruptedError,
    RolloutRejectedError,
)
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.links import EndpointLink
from airflow_mlops.operators.base import Recording, StepOperator, actor, instance_of, optional_text, part_of
from airflow_mlops.runners.base import StepCancelled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context

    from airflow_mlops.services import Services


class DeployModelOperator(StepOperator):
    """Make the local BentoML service answer with a version, at once or step by step; it is started when it does not run.

    The old version answers until the new one is loaded, verified and warm; if that fails, it goes on answering. A strategy other than
    ``recreate`` compares both versions under the same traffic and takes the new one back as soon as it does worse, when the task is
    killed, and when nobody steers for ``lease_seconds``. A retry after a crash goes on where the rollout was; what a comparison took
    back it does not try again, until the task is cleared.
    A retraining whose version serves now is closed in the ledger, unless ``closes_retraining`` is ``False``.

    :param model_name: registered model. (templated)
    :param model_version: version number, or the whole output of a register task; default the one ``alias`` points at. (templated)
    :param alias: see ``model_version``. (templated)
    :param strategy: ``recreate``: all traffic at once. ``blue_green``: at once, with the old version loaded and answering unseen
        beside it until the new one has proved itself. ``shadow``: the new version answers every request unseen, and is not served at
        the end. ``canary``: it answers a growing share. ``ab``: it answers the first of ``shares``, always the same callers (header
        ``x-sticky-key``), and serves at the end if labels show that it is better. (templated)
    :param shares: of the requests that the new version answers, phase by phase, in ``(0, 1)``. (templated)
    :param phase_minutes: length of each phase. (templated)
    :param looks: how often both versions are compared in each phase. (templated)
    :param patience: for how many times its length a phase is waited for when too few requests come; then the old version stays.
        (templated)
    :param tolerances: fields of :class:`~airflow_mlops.core.rollouts.canary.CanaryPolicy` that differ from its defaults. (templated)
    :param quality: labels to judge both versions by as they arrive: ``{"labels": dataset or table, "id_column": …, "target": …,
        "metric": "mae"}``. (templated)
    :param on_reject: what follows when the new version was taken back: ``fail`` the task; ``roll_back``: also let the alias point at the
        version that serves, if it still points at the one that was taken back, and where nothing serves yet that the version could be
        compared with, let it serve at once whatever the strategy; or ``return`` the result, whose ``state`` is ``rolled_back``.
    :param closes_retraining: whether a retraining ends with this deployment: set it to ``False`` for every endpoint but the one the
        retrained model is meant for, such as a staging service or a drill.
    :param own_log: whether the inference log stays in the serving folder, wherever the worker's ``AIRFLOW_MLOPS_LOG_URI`` would have
        it: set it for every service of a model but production's, whose log its checks read.
    :param lease_seconds: how long the shares hold when the task is gone: above 0, at most 3600. (templated)
    :param timeout_seconds: how long the service may take to answer with the new version. (templated)
    :param deferrable: wait in the triggerer; default from ``[operators] default_deferrable``.
    """

    step = "deploy"
    _taking_back = False
    needs = frozenset({"mlflow", "bentoml", "ledger"})
    operator_extra_links = (EndpointLink(),)
    template_fields: Sequence[str] = (
        "model_name",
        "model_version",
        "alias",
        "strategy",
        "shares",
        "phase_minutes",
        "looks",
        "patience",
        "tolerances",
        "quality",
        "lease_seconds",
        "timeout_seconds",
    )

    def __init__(
        self,
        *,
        model_name: str,
        model_version: str | Mapping[str, Any] | None = None,
        alias: str = "champion",
        strategy: Literal["recreate", "blue_green", "shadow", "canary", "ab"] | str = "recreate",
        shares: Sequence[float] | str = (0.05, 0.25, 0.5),
        phase_minutes: float | str = 10.0,
        looks: int | str = 2,
        patience: float | str = 3.0,
        tolerances: Mapping[str, Any] | None = None,
        quality: Mapping[str, Any] | None = None,
        on_reject: Literal["fail", "roll_back", "return"] = "fail",
        closes_retraining: bool = True,
        own_log: bool = False,
        lease_seconds: float | str = 60.0,
        timeout_seconds: float | str = 120.0,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.model_version = model_version
        self.alias = alias
        self.strategy = strategy
        self.shares = shares
        self.phase_minutes = phase_minutes
        self.looks = looks
        self.patience = patience
        self.tolerances = tolerances
        self.quality = quality
        self.on_reject = on_reject
        self.closes_retraining = closes_retraining
        self.own_log = own_log
        self.lease_seconds = lease_seconds
        self.timeout_seconds = timeout_seconds
        self.deferrable = deferrable

    def execute(self, context: Context) -> dict[str, Any]:
        """Deploy; wait for the end of a rollout, without a worker when deferrable."""
        return self._carry_on(context, self.build_spec(context))

    def resume(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on after a wait."""
        if event["lease"]:
            self.log.warning("%s", event["lease"])
        return self._carry_on(context, event["spec"])

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.deploy.DeploySpec`."""
        return {
            "model_name": self.model_name,
            "model_version": optional_text(part_of(self.model_version, "model_version")),
            "alias": self.alias,
            "strategy": self.strategy,
            "shares": [float(share) for share in _listed(self.shares)],
            "phase_seconds": 60.0 * float(self.phase_minutes),
            "looks": int(self.looks),
            "patience": float(self.patience),
            "policy": dict(self.tolerances or {}),
            "quality": dict(self.quality) if self.quality else None,
            "lease_seconds": float(self.lease_seconds),
            "rollout": instance_of(context),
            "request": _request(context),
            "actor": actor(context),
            # A comparison that can't be would fail in every run: there is nothing to go back to either.
            "first_serves": self.on_reject == "roll_back",
            "own_log": self.own_log,
            "timeout_seconds": float(self.timeout_seconds),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write what serves now to the ledger and link to the service."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(EndpointLink, result["endpoint_url"])
        state = f"{result['deployment_uid']}|{result['revision']}"
        if result["serving_version"] != result["model_version"]:
            return  # the ledger has it all in the rollout's own entries
        self.write_entry(
            context,
            kind=EntryKind.DEPLOYMENT,
            key=f"{result['endpoint_url']}|{result['model_name']}|{state}|{result['package_digest']}",
            model_name=result["model_name"],
            window=None,
            subject=result["model_version"],
            summary=f"{result['endpoint_url']} serves {result['model_name']} version {result['model_version']} "
            f"after {result['seconds']:.1f} s",
            payload=result,
        )
        if self.closes_retraining:
            close_retraining(self, result, context)

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Fail when the new version was taken back."""
        if result["state"] != "rolled_back" or self.on_reject == "return":
            return result
        if self.on_reject == "roll_back":
            self._roll_alias_back(result, context)
        raise RolloutRejectedError(
            f"version {result['model_version']} of {result['model_name']} was taken back, version "
            f"{result['serving_version']} serves at {result['endpoint_url']}: {result['reason']}",
            evidence=result,
        )

    def on_kill(self) -> None:
        """Stop steering: what is under way is rolled back on the way out, which being killed again does not keep from its end."""
        with suppress(StepCancelled):  # it is the rollout that ends, and in its own words
            super().on_kill()
        if not self._taking_back:
            raise RolloutInterruptedError("the task was killed")

    def _carry_on(self, context: Context, spec: dict[str, Any]) -> dict[str, Any]:
        """Go as far as possible, wait, and go on, until the rollout has ended one way or the other."""
        from airflow.sdk.exceptions import TaskDeferred

        before: dict[str, Any] | None = None
        self._taking_back = False
        # Asked for now: a signal may come in the middle of asking, and whoever is killed must not have to ask again.
        services = self.services()
        try:
            while (result := self._runner.run(self.step, spec, self.services()))["state"] == "waiting":
                before = result
                # The version of now, whatever happens to the alias; with its digest no step needs MLflow any more.
                spec = spec | {name: result[name] for name in ("model_version", "package_digest")}
                self.log.info("%s; next look in %.0f s", result["reason"], result["wait_seconds"])
                self._wait(result, spec)
        except TaskDeferred:
            raise
        except BaseException as err:
            self._taking_back = True
            if spec["strategy"] != "recreate":
                self._take_back(spec, services, before, f"{type(err).__name__}: {err}")
            raise
        return self._conclude(result, context)

    def _take_back(
        self, spec: dict[str, Any], services: Services, before: dict[str, Any] | None, reason: str
    ) -> None:
        """Let the old version serve, and write down why; at least the former."""
        from airflow_mlops.triggers.rollout import renew_lease

        try:
            self._runner.run(self.step, {**spec, "abort": reason}, services)
        except Exception:
            self.log.exception("the rollout could not be taken back in order: its lease is ended")
            if before is not None:
                renew_lease(self.bentoml_conn_id, before["revision"], 0.0)

    def _roll_alias_back(self, result: dict[str, Any], context: Context) -> None:
        """Let the alias follow the service, unless somebody has moved it meanwhile."""
        spec = {
            "model_name": result["model_name"],
            "model_version": result["serving_version"],
            "expected_version": result["model_version"],
            "alias": self.alias,
            "reason": f"it did not pass its rollout: {result['reason']}"[:500],
            "actor": actor(context),
            "requested_at": datetime.now(UTC).isoformat(),
            "request": f"{instance_of(context)}|{result['revision']}",
        }
        try:
            self._runner.run("roll-back", spec, self.services())
        except PromotionConflictError as err:
            self.log.warning("%s", err)
        else:
            if self.closes_retraining:
                close_retraining(self, result, context, rejected=spec["reason"])

    def _wait(self, result: dict[str, Any], spec: dict[str, Any]) -> None:
        """Wait for the next look, and say all the while that somebody steers."""
        until = datetime.now(UTC) + timedelta(seconds=result["wait_seconds"])
        if self.deferrable:
            self._defer(result, spec, until)
        from airflow_mlops.triggers.rollout import renew_lease

        while (left := (until - datetime.now(UTC)).total_seconds()) > 0.0:
            try:
                renew_lease(self.bentoml_conn_id, result["revision"], spec["lease_seconds"])
            except EndpointUnavailableError as err:  # it may be back before the lease runs out
                self.log.warning("the lease could not be renewed: %s", err)
            except ValueError as err:
                self.log.warning("%s", err)
                return
            time.sleep(min(left, spec["lease_seconds"] / 3.0))

    def _defer(self, result: dict[str, Any], spec: dict[str, Any], until: datetime) -> NoReturn:
        from airflow_mlops.triggers.rollout import RolloutTrigger

        self.defer(
            trigger=RolloutTrigger(
                bentoml_conn_id=self.bentoml_conn_id,
                mlflow_conn_id=self.mlflow_conn_id,
                ledger_conn_id=self.ledger_conn_id,
                signing_conn_id=self.signing_conn_id,
                revision=result["revision"],
                until=until.isoformat(),
                spec=spec,
            ),
            method_name="resume",
        )


def close_retraining(
    operator: Recording, result: Mapping[str, Any], context: Context, *, rejected: str | None = None
) -> None:
    """Write the outcome of the retraining that this version was promoted for.

    :param rejected: why it is champion no more; ``None``: it serves.
    """
    from airflow_mlops.ledger import EntryKind

    with LedgerHook(ledger_conn_id=operator.ledger_conn_id).get_conn() as ledger:
        opened = ledger.open_retraining(result["model_name"])
        promotion = ledger.promotion_for(opened) if opened else None
    if opened is None or promotion is None or promotion.subject != result["model_version"]:
        return
    told = f"was taken back: {rejected}" if rejected else "serves"
    operator.write_entry(
        context,
        kind=EntryKind.RETRAINING_OUTCOME,
        key=opened.key,
        model_name=result["model_name"],
        window=None,
        subject=result["model_version"],
        summary=f"the retraining of {result['model_name']} ended: version {result['model_version']} {told}",
        payload={
            "outcome": "rejected" if rejected else "promoted",
            "model_version": result["model_version"],
            "reason": rejected or promotion.payload["reason"],
        },
    )


def _request(context: Context) -> str:
    """Name the run of a task whose retries belong together: clearing it sets the last of its tries anew."""
    last_try = getattr(context["ti"], "max_tries", None)
    return f"until try {last_try + 1}" if last_try is not None else ""


def _listed(shares: Sequence[float] | str) -> Sequence[float | str]:
    """Read shares that may have been rendered to text: ``0.1, 0.5`` or ``[0.1, 0.5]``."""
    if isinstance(shares, str):
        return [part for part in shares.strip("[]() ").split(",") if part.strip()]
    return shares
