"""Roll back: the champion alias goes one step back, or to a named version."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import ArtifactIntegrityError, ModelVersionNotFoundError, PromotionConflictError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.ledger.lineage import Pointer, pointer_of
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.registry.aliases import move_clock, require_movable, show_aliases
from airflow_mlops.steps.registry.packages import require_signed

if TYPE_CHECKING:
    from airflow_mlops.integrations.mlflow import RegisteredVersion
    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBackSpec:
    """What to take back.

    :param model_name: registered model.
    :param model_version: version to go back to; ``None``: the champion before this one.
    :param expected_version: version the alias has to point at still; ``None``: any.
    :param alias: the alias to move.
    :param reason: sentence for the ledger.
    :param actor: who rolls back.
    :param requested_at: when it was asked for; ``None``: not known.
    :param now: time of the rollback; ``None``: when the ledger carries it out.
    :param request: names this rollback, so that a retry is no second step back; default ``now``, or else when it was asked for.
    """

    model_name: str
    model_version: str | None = None
    expected_version: str | None = None
    alias: str = "champion"
    reason: str = "rolled back"
    actor: str
    requested_at: datetime | None = None
    now: datetime | None = None
    request: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBackResult:
    """Where the alias points now."""

    model_name: str
    model_version: str
    previous_version: str
    alias: str
    version_url: str


def run(spec: RollBackSpec, services: Services) -> RollBackResult:
    """Move the alias back.

    :raises ModelVersionNotFoundError: there is no champion, or none before it.
    :raises ArtifactIntegrityError: signatures are asked for, and the version has none that is trusted; or the number of the one
        before has another package by now.
    :raises PromotionConflictError: somebody moved the alias meanwhile, or since this very rollback was carried out.
    :raises ValueError: ``alias`` is ``previous``, which is never moved by itself; or nothing names the rollback.
    """
    require_movable(spec.alias)
    registry = Registry.connect(services)
    ledger = Ledger.open(services.require("ledger_url"))
    request = _request(spec)
    key = f"{spec.model_name}|{spec.alias}"
    try:
        # What a former try of the same task wrote.
        done = ledger.find(EntryKind.ROLLBACK, f"{key}|{request}")
        if done is not None:
            left = Pointer(str(done.payload["previous_version"]), done.payload.get("previous_package_digest"))
            current, target = left.model_version, pointer_of(done)
        else:
            left = _current(ledger, spec)
            current = left.model_version
            if spec.expected_version not in (None, current):
                raise PromotionConflictError(
                    f"{spec.alias} of {spec.model_name} is version {current} by now, not {spec.expected_version}: it stays"
                )
            target = Pointer(spec.model_version) if spec.model_version else _before(ledger, spec, current)
        version = _there(registry, spec, target)
        number = version.model_version
        require_signed(version, services)
        ledger.move_alias(
            model_name=spec.model_name,
            alias=spec.alias,
            model_version=number,
            expected_version=current,
            entry=LedgerEntry(
                kind=EntryKind.ROLLBACK,
                key=key,
                model_name=spec.model_name,
                window=None,
                subject=number,
                summary=f"{spec.alias} of {spec.model_name} went back from version {current} to {number}: {spec.reason}",
                payload={
                    "alias": spec.alias,
                    "model_version": number,
                    "package_digest": version.package_digest,
                    "previous_version": current,
                    "previous_package_digest": left.package_digest,
                    "reason": spec.reason,
                    "requested_at": spec.requested_at.isoformat() if spec.requested_at else None,
                },
                actor=spec.actor,
                recorded_at=move_clock(spec.now)(),
            ),
            request=request,
            clock=move_clock(spec.now),
        )
        show_aliases(registry, ledger, spec.model_name)
    finally:
        ledger.close()
    return RollBackResult(
        model_name=spec.model_name,
        model_version=number,
        previous_version=current,
        alias=spec.alias,
        version_url=registry.version_url(version),
    )


def _request(spec: RollBackSpec) -> str:
    if spec.request:
        return hashlib.sha256(spec.request.encode()).hexdigest()[:32]
    asked_at = spec.now or spec.requested_at
    if asked_at is None:
        raise ValueError("a rollback needs a name that a retry has, too: give request, requested_at or now")
    return asked_at.isoformat()


def _there(registry: Registry, spec: RollBackSpec, target: Pointer) -> RegisteredVersion:
    number = target.model_version
    try:
        version = registry.version(spec.model_name, number)
    except ModelVersionNotFoundError as err:
        if spec.model_version is not None:
            raise
        raise ModelVersionNotFoundError(
            f"{spec.alias} of {spec.model_name!r} was version {number} before, and MLflow no longer has it: name model_version, one "
            "that is there"
        ) from err
    if target.package_digest not in {None, version.package_digest}:
        raise ArtifactIntegrityError(
            f"{spec.alias} of {spec.model_name!r} was version {number} with package {target.package_digest} before, and version "
            f"{number} in MLflow holds {version.package_digest}: the model was deleted and made anew. Name model_version, one "
            "that was evaluated"
        )
    return version


def _current(ledger: Ledger, spec: RollBackSpec) -> Pointer:
    move = ledger.last_move(spec.model_name, spec.alias)
    if move is None:
        raise ModelVersionNotFoundError(
            f"model {spec.model_name!r} has no {spec.alias} in the ledger: nothing to roll back"
        )
    return pointer_of(move)


def _before(ledger: Ledger, spec: RollBackSpec, current: str) -> Pointer:
    """Find the version that was there before the current one came; going back twice goes two steps back."""
    standing = ledger.standing_moves(spec.model_name, spec.alias)
    if len(standing) < 2:  # the current one, and the one before it
        raise ModelVersionNotFoundError(
            f"version {current} is the first {spec.alias} of {spec.model_name!r}: there is none before it; "
            "name model_version"
        )
    return pointer_of(standing[-2])


STEP = Step(name="roll-back", spec=RollBackSpec, result=RollBackResult, run=run)
