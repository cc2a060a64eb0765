"""Predecessors: the verdict on a model that has learned from all rows, so that none is left to test it on."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.comparison.promotion import Check, Outcome, PromotionDecision, Verdict
from airflow_mlops.core.decision.challengers import ChallengerCheck
from airflow_mlops.exceptions import ModelVersionNotFoundError
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.steps.registry.packages import require_signed, version_manifest

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.windows import Window
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.services import Services


class EarnedPromotion(NamedTuple):
    """A retraining decision that promises a promotion without a test of the new model itself.

    :param window: the decided window.
    :param recipe: how the model has to be made; ``None``: it does not matter.
    :param champion_version: the champion that its predecessors beat; ``None``: nobody was compared.
    :param predecessor: version of the recipe's newest model that was compared in the window; ``None``: none was.
    :param since: first instant of the rows it learns from; ``None``: whatever comes first.
    :param until: first instant after them.
    :param tested: whether predecessors were tested; a policy may do without.
    :param reason: sentence.
    :param closed: what became of it, where it was carried out by another run; ``None``: it is still to be.
    """

    window: Window
    recipe: str | None
    champion_version: str | None
    predecessor: str | None
    since: datetime | None
    until: datetime
    tested: bool
    reason: str
    closed: str | None = None


def find_earned(
    services: Services, model_name: str, decision_key: str | None, *, run_id: str
) -> EarnedPromotion | None:
    """Read from the ledger whether a decision lets its model do without a test of its own.

    :param run_id: the run that asks; what became of the decision through it may be asked again.
    :raises ValueError: the key names no decision to retrain this model.
    """
    if decision_key is None:
        return None
    with Ledger.open(services.require("ledger_url")) as ledger:
        ledger.require_decision(decision_key, model_name)
        decision = ledger.find(EntryKind.RETRAINING_DECISION, decision_key)
        if decision is None or decision.window is None:
            return None
        if decision.payload["outcome"] != "retrain":
            raise ValueError(
                f"decision {decision_key!r} was {decision.payload['outcome']!r}: it asks for no model of {model_name}. Pass the "
                "decision_key that DecideRetrainingOperator returned with retrain=true"
            )
        if decision.payload["promote_on"] == "held_out":
            return None
        outcome = ledger.find(EntryKind.RETRAINING_OUTCOME, decision_key)
        checks = ledger.entries(
            kind=EntryKind.CHALLENGER_CHECK, model_name=model_name, window=decision.window, limit=1
        )
    training, recipe = decision.payload["training"], decision.payload["recipe"]
    check = (
        checks[0].payload["check"] if checks else None
    )  # none either where the champion had seen the window
    compared = from_dict(ChallengerCheck, check).newest(recipe) if check else None
    return EarnedPromotion(
        window=decision.window,
        recipe=recipe,
        champion_version=decision.payload["champion_version"],
        predecessor=compared.version if compared else None,
        since=datetime.fromisoformat(training["start"]) if training["start"] else None,
        until=datetime.fromisoformat(training["end"]),
        tested=decision.payload["promote_on"] == "predecessors",
        reason=str(decision.payload["grounds"] or decision.payload["reason"]),
        closed=outcome.summary if outcome and outcome.payload.get("run_id") != run_id else None,
    )


def read_predecessor(
    earned: EarnedPromotion, model_name: str, registry: Registry, services: Services
) -> PackageManifest | None:
    """Read how the model was made that earned the promotion; ``None`` when there is none any more.

    :raises ArtifactIntegrityError: it is not the package that was registered, or nobody trusted has signed it.
    """
    if earned.predecessor is None:
        return None
    try:
        version = registry.version(model_name, earned.predecessor)
        require_signed(version, services)
        return version_manifest(registry, version)
    except ModelVersionNotFoundError:
        return None


def judge_earned(
    earned: EarnedPromotion,
    manifest: PackageManifest,
    predecessor: PackageManifest | None,
    champion_version: str | None,
    artifact: Check,
) -> PromotionDecision:
    """Hold the model against what was decided: made as its predecessor was, of the decided rows, for the same champion.

    :param predecessor: the model that was compared with the champion.
    :param champion_version: the present champion.
    :param artifact: what came of running the packaged model.
    """
    checks = (_as_decided(earned, manifest, predecessor, champion_version), artifact)
    failed = [check for check in checks if check.outcome is not Outcome.PASS]
    if not failed:
        return PromotionDecision(verdict=Verdict.PROMOTE, reason=earned.reason, checks=checks)
    verdict = Verdict.REJECT if any(check.outcome is Outcome.FAIL for check in failed) else Verdict.NO_VERDICT
    return PromotionDecision(
        verdict=verdict, reason="; ".join(check.reason for check in failed), checks=checks
    )


def _as_decided(
    earned: EarnedPromotion,
    manifest: PackageManifest,
    predecessor: PackageManifest | None,
    champion_version: str | None,
) -> Check:
    wrong = _other_training(earned, manifest)
    if wrong is None and earned.tested:
        if champion_version != earned.champion_version:
            wrong = f"its predecessors beat version {earned.champion_version}, and version {champion_version} is champion by now"
        elif predecessor is None:
            return Check(
                name="predecessors",
                outcome=Outcome.NOT_MEASURED,
                reason=f"no model of recipe {earned.recipe!r} that was compared in {earned.window} is registered: nobody can say "
                "whether this one was made like it",
            )
        else:
            wrong = _other_method(earned, manifest, predecessor)
    if wrong is not None:
        return Check(name="predecessors", outcome=Outcome.FAIL, reason=wrong)
    return Check(name="predecessors", outcome=Outcome.PASS, reason=earned.reason)


def _other_training(earned: EarnedPromotion, manifest: PackageManifest) -> str | None:
    """Say why it is not the training that was decided."""
    trained, until = manifest.trained_on, f"{earned.until:%Y-%m-%d %H:%M}"
    if earned.closed is not None:
        return f"the decision was carried out already: {earned.closed}"
    if earned.recipe is not None and trained.recipe != earned.recipe:
        return (
            f"models of recipe {earned.recipe!r} earned the promotion, and this one is of {trained.recipe!r}"
        )
    if trained.window is None:
        return (
            f"it was decided on rows until {until}, and the model does not say which ones it has learned from"
        )
    if trained.window.end > earned.until:
        return f"it was decided on rows until {until}, and the model has learned from later ones"
    if trained.window.end < earned.until:
        return f"it was decided on all rows until {until}, and the model has learned from those until {trained.window.end:%Y-%m-%d %H:%M} only"
    if earned.since is not None and trained.window.start != earned.since:
        return f"it was decided on rows from {earned.since:%Y-%m-%d %H:%M} on, and the model has learned from those of {trained.window}"
    return None


def _other_method(
    earned: EarnedPromotion, manifest: PackageManifest, predecessor: PackageManifest
) -> str | None:
    """Say that it was made in another way, whatever name its recipe has: what others were worth tells nothing of it then."""
    method = manifest.trained_on.method_digest
    if method is not None and method == predecessor.trained_on.method_digest:
        return None
    return (
        f"version {earned.predecessor} of recipe {earned.recipe!r} earned the promotion, and this model was made by another "
        "estimator, with other parameters or columns, or by other code: register it as a challenger (alias='shadow'), and it is "
        "compared in the next window"
    )
