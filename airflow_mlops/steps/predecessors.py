"""Predecessors: the verdict on a model that has learned from all rows, so that none is left to test it on."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.core.promotion import Check, Outcome, PromotionDecision, Verdict
from airflow_mlops.ledger import EntryKind, Ledger

if TYPE_CHECKING:
    from airflow_mlops.core.package import PackageManifest
    from airflow_mlops.core.windows import Window
    from airflow_mlops.services import Services


class EarnedPromotion(NamedTuple):
    """A retraining decision that promises a promotion without a test of the new model itself.

    :param window: the decided window.
    :param recipe: how the model has to be made; ``None``: it does not matter.
    :param champion_version: the champion that its predecessors beat; ``None``: nobody was compared.
    :param until: first instant after the rows it learns from.
    :param tested: whether predecessors were tested; a policy may do without.
    :param reason: sentence.
    """

    window: Window
    recipe: str | None
    champion_version: str | None
    until: datetime
    tested: bool
    reason: str


def find_earned(services: Services, model_name: str, decision_key: str | None) -> EarnedPromotion | None:
    """Read from the ledger whether a decision lets its model do without a test of its own.

    :raises ValueError: the key names no decision to retrain this model.
    """
    if decision_key is None:
        return None
    with Ledger.open(services.require("ledger_url")) as ledger:
        ledger.require_decision(decision_key, model_name)
        decision = ledger.find(EntryKind.RETRAINING_DECISION, decision_key)
    if decision is None or decision.window is None or decision.payload["promote_on"] == "held_out":
        return None
    return EarnedPromotion(
        window=decision.window,
        recipe=decision.payload["recipe"],
        champion_version=decision.payload["champion_version"],
        until=datetime.fromisoformat(decision.payload["training"]["end"]),
        tested=decision.payload["promote_on"] == "predecessors",
        reason=str(decision.payload["grounds"] or decision.payload["reason"]),
    )


def judge_earned(
    earned: EarnedPromotion,
    manifest: PackageManifest,
    champion_version: str | None,
    artifact: Check,
) -> PromotionDecision:
    """Hold the model against what was decided: made as its predecessors were, of rows up to the decided window, for the same champion.

    :param champion_version: the present champion.
    :param artifact: what came of running the packaged model.
    """
    checks = (_predecessors(earned, manifest, champion_version), artifact)
    failed = [check for check in checks if check.outcome is not Outcome.PASS]
    if not failed:
        return PromotionDecision(verdict=Verdict.PROMOTE, reason=earned.reason, checks=checks)
    verdict = Verdict.REJECT if any(check.outcome is Outcome.FAIL for check in failed) else Verdict.NO_VERDICT
    return PromotionDecision(
        verdict=verdict, reason="; ".join(check.reason for check in failed), checks=checks
    )


def _predecessors(earned: EarnedPromotion, manifest: PackageManifest, champion_version: str | None) -> Check:
    trained = manifest.trained_on
    wrong = None
    if earned.recipe is not None and trained.recipe != earned.recipe:
        wrong = (
            f"models of recipe {earned.recipe!r} earned the promotion, and this one is of {trained.recipe!r}"
        )
    elif trained.window_end is None or trained.window_end > earned.until:
        wrong = f"it was decided on rows until {earned.until:%Y-%m-%d %H:%M}, and the model has learned from later ones"
    elif earned.tested and champion_version != earned.champion_version:
        wrong = f"its predecessors beat version {earned.champion_version}, and version {champion_version} is champion by now"
    if wrong is not None:
        return Check(name="predecessors", outcome=Outcome.FAIL, reason=wrong)
    return Check(name="predecessors", outcome=Outcome.PASS, reason=earned.reason)
