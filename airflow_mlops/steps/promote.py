"""Promote: move the champion alias by compare-and-set in the ledger, then show it in MLflow."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from airflow_mlops.core.codec import canonical_json, to_dict
from airflow_mlops.core.decision.retraining import Outcome
from airflow_mlops.exceptions import ModelVersionNotFoundError, PromotionConflictError, PromotionRejectedError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.ledger.aliases import standing_rollback
from airflow_mlops.ledger.lineage import CHAMPION
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.registry.aliases import move_clock, require_movable, show_aliases
from airflow_mlops.steps.registry.packages import require_signed
from airflow_mlops.steps.registry.provenance import is_package_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlops.integrations.mlflow import RegisteredVersion
    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class PromoteSpec:
    """What to promote, and in whose place.

    :param model_name: registered model.
    :param model_version: the version that earned it.
    :param expected_version: the champion it was compared with; ``None`` when there was none. Somebody else's
        promotion in between makes this one lose.
    :param verdict: what its evaluation concluded; ``None``, with ``evaluated_run_id``: promoted by hand.
    :param evaluated_run_id: the run that was evaluated; it must hold this version's package. ``None``, with a verdict: an earlier
        champion comes back, as ``decision_key`` wants.
    :param package_digest: of the package that was registered, and approved; ``None``: any.
    :param asked_after: newest move of the alias, by its number in the ledger, that the person who approved it could be told of: clocks
        of two machines do not tell which of two came first. ``None``: those until ``approved_at``.
    :param approved_at: when a person approved it; ``None`` where nobody was asked.
    :param alias: the alias to move; the version that ``champion`` leaves gets ``previous``.
    :param reason: sentence for the ledger; default is what its evaluation concluded, or that there was none.
    :param decision_key: retraining decision this promotion answers; it is closed when the version serves.
    :param actor: who promotes (Dag, run and task, or a person).
    :param requested_at: when it was asked for; ``None``: not known.
    :param now: time of the promotion; ``None``: when the ledger carries it out.
    """

    model_name: str
    model_version: str
    expected_version: str | None = None
    verdict: str | None = None
    evaluated_run_id: str | None = None
    package_digest: str | None = None
    asked_after: int | None = None
    approved_at: datetime | None = None
    alias: str = "champion"
    reason: str | None = None
    decision_key: str | None = None
    actor: str
    requested_at: datetime | None = None
    now: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromoteResult:
    """Where the alias points now."""

    model_name: str
    model_version: str
    previous_version: str | None
    alias: str
    moved: bool
    version_url: str


def run(spec: PromoteSpec, services: Services) -> PromoteResult:
    """Move the alias. Running it again, also after a crash half-way, ends in the same state.

    A former run that was killed after the ledger had decided is completed first, whatever this one then comes to.

    :raises PromotionRejectedError: its evaluation, or the approval, is about another package or is no "promote"; or the
        version was rolled back, and nobody has approved it since.
    :raises PromotionConflictError: somebody promoted another version first, or since this very promotion was carried out.
    :raises ModelVersionNotFoundError: no such version.
    :raises ValueError: ``alias`` is ``previous``, which is never moved by itself.
    :raises ArtifactIntegrityError: signatures are asked for, and it has none that is trusted.
    """
    require_movable(spec.alias)
    registry = Registry.connect(services)
    try:
        version = registry.version(spec.model_name, spec.model_version)
    except ModelVersionNotFoundError as err:
        _give_up(spec, services, str(err))
        raise
    _require_earned(spec, registry, version, services)
    require_signed(version, services)
    with Ledger.open(services.require("ledger_url")) as ledger:
        show_aliases(registry, ledger, spec.model_name)
        _adopt(ledger, registry, spec)
        recorded = ledger.move_alias(
            model_name=spec.model_name,
            alias=spec.alias,
            model_version=spec.model_version,
            expected_version=spec.expected_version,
            entry=_entry(spec, version),
            request=_request(spec),
            clock=move_clock(spec.now),
            guard=partial(_require_not_taken_back, spec, version.package_digest),
        )
        # The ledger has decided; from here on every step may be repeated, by anybody.
        show_aliases(registry, ledger, spec.model_name)
    return PromoteResult(
        model_name=spec.model_name,
        model_version=spec.model_version,
        previous_version=recorded.entry.payload["previous_version"],
        alias=spec.alias,
        moved=recorded.created,
        version_url=registry.version_url(version),
    )


def _request(spec: PromoteSpec) -> str:
    """Name what is asked for: all but the times, so that a retry asks for the same."""
    asked = {name: value for name, value in to_dict(spec).items() if name not in {"now", "requested_at"}}
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:32]


def _entry(spec: PromoteSpec, version: RegisteredVersion) -> LedgerEntry:
    reason = spec.reason or (
        f"its evaluation concluded {spec.verdict!r}"
        if spec.verdict
        else "promoted by hand, without an evaluation"
    )
    return LedgerEntry(
        kind=EntryKind.PROMOTION,
        key=f"{spec.model_name}|{spec.alias}|{spec.expected_version}|{spec.model_version}",
        model_name=spec.model_name,
        window=None,
        subject=spec.model_version,
        summary=f"version {spec.model_version} became {spec.alias} of {spec.model_name}: {reason}",
        payload={
            "alias": spec.alias,
            "model_version": spec.model_version,
            "package_digest": version.package_digest,
            "previous_version": spec.expected_version,
            "reason": reason,
            "verdict": spec.verdict,
            "evaluated_run_id": spec.evaluated_run_id,
            "approved_at": spec.approved_at.isoformat() if spec.approved_at else None,
            "decision_key": spec.decision_key,
            "requested_at": spec.requested_at.isoformat() if spec.requested_at else None,
        },
        actor=spec.actor,
        recorded_at=move_clock(spec.now)(),
    )


def _require_earned(
    spec: PromoteSpec, registry: Registry, version: RegisteredVersion, services: Services
) -> None:
    """See that what was registered, evaluated and approved is this version; by hand none of it is given."""
    run_id = spec.evaluated_run_id
    if spec.package_digest not in {None, version.package_digest}:
        why = f"package {spec.package_digest} was registered, or approved, and the version holds {version.package_digest}"
    elif spec.verdict is None and run_id is None:
        return
    elif spec.verdict != "promote":
        why = f"its evaluation concluded {spec.verdict or 'none'!r}: {spec.reason or 'no reason given'}"
    elif run_id is None and _is_to_come_back(spec, services):
        return
    elif run_id is None:
        why = "its evaluation does not say which run it is about, and no open decision wants it back in that champion's place"
    # The same package of another run is the same version, which names the first of them.
    elif not is_package_of(
        run_id,
        package_digest=version.package_digest,
        holder=version.run_id,
        registry=registry,
        services=services,
    ):
        why = f"its evaluation is about run {run_id}, the version is of run {version.run_id} and holds another package"
    else:
        return
    raise PromotionRejectedError(
        f"version {spec.model_version} of {spec.model_name} was not promoted: {why}. Evaluate and register the same training, "
        "or promote by hand, without an evaluation",
        evidence={"verdict": spec.verdict, "evaluated_run_id": run_id, "version_run_id": version.run_id},
    )


def _is_to_come_back(spec: PromoteSpec, services: Services) -> bool:
    """Tell whether the decision is that this earlier champion takes the place of that one: it has met it, and every other model.

    One that has ended is no reason any more, but for a retry of what it ended with.
    """
    with Ledger.open(services.require("ledger_url")) as ledger:
        decision = ledger.find(EntryKind.RETRAINING_DECISION, spec.decision_key or "")
        ended = ledger.find(EntryKind.RETRAINING_OUTCOME, spec.decision_key or "")
        done = ledger.aliases(spec.model_name).get(spec.alias) == spec.model_version
    if decision is None or decision.model_name != spec.model_name or (ended is not None and not done):
        return False
    wanted = Outcome.BRING_BACK, spec.model_version, spec.expected_version
    return tuple(decision.payload.get(name) for name in ("outcome", "version", "champion_version")) == wanted


def _give_up(spec: PromoteSpec, services: Services, why: str) -> None:
    """Close the decision that an earlier champion comes back which is gone for ever: no later run could carry it out."""
    if spec.verdict is None or spec.evaluated_run_id is not None or not _is_to_come_back(spec, services):
        return
    with Ledger.open(services.require("ledger_url")) as ledger:
        ledger.record(
            LedgerEntry(
                kind=EntryKind.RETRAINING_OUTCOME,
                key=spec.decision_key or "",
                model_name=spec.model_name,
                window=None,
                subject=spec.model_version,
                summary=f"the {spec.alias} of {spec.model_name} stays: {why}",
                payload={"outcome": "rejected", "reason": why, "model_version": spec.model_version},
                actor=spec.actor,
                recorded_at=move_clock(spec.now)(),
            )
        )


def _require_not_taken_back(spec: PromoteSpec, package_digest: str, moves: Sequence[LedgerEntry]) -> None:
    """Refuse what somebody took back and nobody has approved since: that it does well on held-out rows was known before, and a person saw more.

    Who was asked before that has approved something else: the question did not say it.
    """
    back = standing_rollback(moves, spec.model_version, package_digest) if spec.verdict is not None else None
    if back is None or _was_told(spec, back):
        return
    remedy = (
        "Ask a person (ApproveModelOperator), or promote by hand, without an evaluation"
        if spec.asked_after is None and spec.approved_at is None
        else "The person who approved it was asked before that: clear the approval's task, and the question says so"
    )
    left = back.payload["previous_version"]
    same = "" if left == spec.model_version else f", which has the package of version {left},"
    raise PromotionRejectedError(
        f"version {spec.model_version} of {spec.model_name}{same} was not promoted: {back.actor} took it back at "
        f"{back.recorded_at:%Y-%m-%d %H:%M} ({back.summary}), and an evaluation alone does not undo that. {remedy}",
        evidence={"rolled_back_by": back.actor, "reason": back.payload.get("reason")},
    )


def _was_told(spec: PromoteSpec, back: LedgerEntry) -> bool:
    """Tell whether who approved it knew that it had been taken back."""
    if spec.asked_after is not None:
        return (back.entry_id or 0) <= spec.asked_after
    return spec.approved_at is not None and spec.approved_at > back.recorded_at


def _adopt(ledger: Ledger, registry: Registry, spec: PromoteSpec) -> None:
    """Take over a champion that was set before there was a ledger."""
    if spec.alias in ledger.aliases(spec.model_name):
        return
    current = registry.find_alias(spec.model_name, spec.alias)
    if spec.expected_version is None:
        _require_none_in_mlflow(spec, current)
        return
    if current is None or current.model_version != spec.expected_version:
        return
    ledger.move_alias(
        model_name=spec.model_name,
        alias=spec.alias,
        model_version=spec.expected_version,
        expected_version=None,
        entry=LedgerEntry(
            kind=EntryKind.PROMOTION,
            key=f"{spec.model_name}|{spec.alias}|adopted|{spec.expected_version}",
            model_name=spec.model_name,
            window=None,
            subject=spec.expected_version,
            summary=f"version {spec.expected_version} was {spec.alias} in MLflow before the ledger began",
            payload={
                "alias": spec.alias,
                "model_version": spec.expected_version,
                "package_digest": current.package_digest,
                "previous_version": None,
            },
            actor=spec.actor,
            recorded_at=move_clock(spec.now)(),
        ),
    )


def _require_none_in_mlflow(spec: PromoteSpec, current: RegisteredVersion | None) -> None:
    """Refuse to take a first champion's place unseen: until the ledger has one, the evaluation goes by MLflow, and so does this."""
    if spec.alias == CHAMPION and current is not None and current.model_version != spec.model_version:
        raise PromotionConflictError(
            f"{spec.alias} of {spec.model_name} was believed to be no version, but somebody set it to version "
            f"{current.model_version} in MLflow; version {spec.model_version} was not promoted. Evaluate against the present "
            f"{spec.alias} again"
        )


STEP = Step(name="promote", spec=PromoteSpec, result=PromoteResult, run=run)
