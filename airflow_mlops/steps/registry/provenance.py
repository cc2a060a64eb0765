"""Provenance: which training made which package, as the ledger has it; who may only write to MLflow can't change that."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry

if TYPE_CHECKING:
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.services import Services


def note_package(services: Services, *, step_key: str, training: dict[str, Any]) -> None:
    """Write down what a training made, where there is a ledger; only the process that made it does so.

    :param step_key: key of the training's inputs.
    :param training: its result.
    """
    if services.ledger_url is None:
        return
    name, run_id, digest = training["model_name"], training["run_id"], training["package_digest"]
    with Ledger.open(services.ledger_url) as ledger:
        ledger.record(
            LedgerEntry(
                kind=EntryKind.PACKAGE,
                key=run_id,
                model_name=name,
                window=None,
                subject=step_key,
                summary=f"run {run_id} made package {digest} of {name}",
                payload=training,
                actor=f"run {run_id}",
                recorded_at=datetime.now(UTC),
            )
        )


def noted_trainings(services: Services, step_key: str) -> list[dict[str, Any]]:
    """Give the results of all trainings with these inputs, newest first; none where there is no ledger."""
    if services.ledger_url is None:
        return []
    with Ledger.open(services.ledger_url) as ledger:
        return [entry.payload for entry in ledger.entries(kind=EntryKind.PACKAGE, subject=step_key)]


def require_noted(services: Services, *, run_id: str, package_digest: str, vouched_by: str | None) -> None:
    """Refuse to sign what no training is known to have made and nobody vouches for.

    Where there is no ledger, whoever gives the digest vouches for it.

    :param vouched_by: who vouches for a package the ledger knows nothing of.
    :raises ArtifactIntegrityError: saying what the ledger knows.
    """
    if services.ledger_url is None:
        return
    made = _noted_digest(services, run_id)
    if made == package_digest or (made is None and vouched_by):
        return
    known = f"made package {made}" if made else "is not known to have made any package here"
    raise ArtifactIntegrityError(
        f"package {package_digest} was not signed: by the ledger, run {run_id} {known}, and whoever may write to MLflow can "
        "have put it there. Train again; or, if you know where it comes from (another ledger, an older release), give "
        "vouched_by with your name"
    )


def is_package_of(
    run_id: str, *, package_digest: str, holder: str, registry: Registry, services: Services
) -> bool:
    """Tell whether a run made a package. Where keys are configured MLflow's word does not do, once the ledger knows better.

    :param run_id: the run.
    :param holder: a run that holds the package.
    :raises ModelVersionNotFoundError: there is no such run.
    """
    signed = bool(services.signing_public_keys)
    made = _noted_digest(services, run_id) if signed else None
    if made is not None:
        return made == package_digest
    return run_id == holder or (not signed and registry.run_digest(run_id) == package_digest)


def _noted_digest(services: Services, run_id: str) -> str | None:
    if services.ledger_url is None:
        return None
    with Ledger.open(services.ledger_url) as ledger:
        entry = ledger.find(EntryKind.PACKAGE, run_id)
    return str(entry.payload["package_digest"]) if entry else None
