"""ML Test Score of a model: what the ledger and MLflow know of it, scored; and the word of a person, written down."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.ml_test.attestation import attestation_payload
from airflow_mlops.core.ml_test.facts import Fact, ModelFacts, RunFacts
from airflow_mlops.core.ml_test.ml_test_rules import score_facts
from airflow_mlops.core.ml_test.ml_test_score import MLTestScore, ScorePolicy
from airflow_mlops.exceptions import MLOpsError, ModelVersionNotFoundError
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry

if TYPE_CHECKING:
    from airflow_mlops.core.windows import Window
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.services import Services

#: Newest entries of a kind that are read; more are needed by no rule.
ENTRIES_READ = 120

_OF_THE_MODEL = (
    EntryKind.TRAINING,
    EntryKind.EVALUATION,
    EntryKind.EXPLANATION,
    EntryKind.REGISTRATION,
    EntryKind.PROMOTION,
    EntryKind.ROLLBACK,
    EntryKind.ROLLOUT,
    EntryKind.DEPLOYMENT,
    EntryKind.DRIFT_CHECK,
    EntryKind.PERFORMANCE_CHECK,
    EntryKind.CHALLENGER_CHECK,
    EntryKind.RETRAINING_DECISION,
    EntryKind.ATTESTATION,
)
_OF_A_VERSION = (EntryKind.REGISTRATION, EntryKind.PROMOTION, EntryKind.ROLLOUT, EntryKind.DEPLOYMENT)
_OF_A_RUN = (EntryKind.TRAINING, EntryKind.EVALUATION, EntryKind.EXPLANATION)
_OF_WINDOWS = {
    EntryKind.DRIFT_CHECK,
    EntryKind.PERFORMANCE_CHECK,
    EntryKind.CHALLENGER_CHECK,
    EntryKind.RETRAINING_DECISION,
}

#: Where :mod:`airflow_mlops.steps.explain` puts what it found.
_EXPLANATION = "explanation"


def score_model(
    model_name: str, services: Services, *, now: datetime, policy: ScorePolicy | None = None
) -> MLTestScore:
    """Score a model by what is known of it now.

    Without MLflow, or where it does not answer, what only it knows counts as not known, and the score says so.

    :param model_name: registered model.
    :param now: evidence ages up to then.
    :param policy: when evidence still counts.
    :raises ModelVersionNotFoundError: the ledger has no entry about the model.
    """
    with Ledger.open(services.require("ledger_url"), create=False) as ledger:
        facts = _facts(ledger, model_name, services, now)
    return score_facts(facts, policy or ScorePolicy())


def attest(
    model_name: str,
    services: Services,
    *,
    test_id: str,
    by: str,
    evidence: str,
    now: datetime,
    automated: bool = False,
    days: float | None = None,
) -> LedgerEntry:
    """Write down that a person vouches for a test.

    :param test_id: such as ``data-5``.
    :param by: a name.
    :param evidence: link to what can be looked at.
    :param now: when it is said.
    :param automated: a job does it again and again, and the link leads to it.
    :param days: how long it counts; default a year.
    :raises ValueError: the test is one that is measured, the name is empty, the evidence is no link, or it would never count.
    :raises ModelVersionNotFoundError: the ledger has no entry about the model.
    """
    payload = attestation_payload(
        test_id=test_id,
        by=by,
        evidence=evidence,
        automated=automated,
        at=now,
        days=ScorePolicy().attestation_days if days is None else days,
    )
    with Ledger.open(services.require("ledger_url"), create=False) as ledger:
        _require_known(ledger, model_name)
        return ledger.record(
            LedgerEntry(
                kind=EntryKind.ATTESTATION,
                key=f"{model_name}|{test_id}|{now.isoformat()}",
                model_name=model_name,
                window=None,
                subject=test_id,
                summary=f"{payload['by']} vouches for {test_id} of {model_name}"
                f"{' (automated)' if automated else ''}: {evidence}",
                payload=payload,
                actor=payload["by"],
                recorded_at=now,
            )
        ).entry


def _require_known(ledger: Ledger, model_name: str) -> None:
    if ledger.entries(model_name=model_name, limit=1):
        return
    newest = ledger.entries(kind=[EntryKind.TRAINING, EntryKind.PROMOTION], limit=200)
    known = ", ".join(sorted({entry.model_name for entry in newest if entry.model_name})) or "none"
    raise ModelVersionNotFoundError(f"the ledger knows no model named {model_name!r}; known: {known}")


def _facts(ledger: Ledger, model_name: str, services: Services, now: datetime) -> ModelFacts:
    _require_known(ledger, model_name)
    found = [
        entry
        for kind in _OF_THE_MODEL
        for entry in ledger.entries(kind=kind, model_name=model_name, limit=ENTRIES_READ)
    ]
    for table in _tables(found):
        found += ledger.entries(kind=EntryKind.VALIDATION, subject=table, limit=ENTRIES_READ)
    champion = ledger.aliases(model_name).get("champion")
    run = _run(model_name, champion, services)
    # The champion may be older than the newest entries.
    if champion is not None:
        found += ledger.entries(kind=_OF_A_VERSION, model_name=model_name, subject=champion)
        found += _answered(ledger, found, champion)
    for made in _champion_runs(found, champion, run):
        found += ledger.entries(kind=_OF_A_RUN, model_name=model_name, subject=made)
    return ModelFacts(
        model_name=model_name,
        now=now,
        champion=champion,
        champion_runs=_champion_runs(found, champion, run),
        windows=_windows(found),
        facts=tuple(_fact(entry) for entry in sorted(found, key=lambda one: one.entry_id or 0, reverse=True)),
        run=run,
    )


def _answered(ledger: Ledger, found: list[LedgerEntry], champion: str) -> list[LedgerEntry]:
    """Find the retraining decisions that the champion's promotions answered."""
    keys = {
        str(entry.payload["decision_key"])
        for entry in found
        if entry.kind is EntryKind.PROMOTION
        and entry.subject == champion
        and entry.payload.get("decision_key")
    }
    decisions = [ledger.find(EntryKind.RETRAINING_DECISION, key) for key in keys]
    return [decision for decision in decisions if decision is not None]


def _fact(entry: LedgerEntry) -> Fact:
    return Fact(
        kind=str(entry.kind),
        entry_id=entry.entry_id or 0,
        key=entry.key,
        subject=entry.subject,
        window=entry.window,
        payload=entry.payload,
        summary=entry.summary,
        actor=entry.actor,
        at=entry.recorded_at,
    )


def _tables(found: list[LedgerEntry]) -> set[str]:
    """Name the tables the model was trained on."""
    trained = [entry.payload.get("dataset") or {} for entry in found if entry.kind is EntryKind.TRAINING]
    return {str(dataset["uri"]) for dataset in trained if dataset.get("uri")}


def _windows(found: list[LedgerEntry]) -> tuple[Window, ...]:
    """List the windows anybody looked at, newest first."""
    seen = {entry.window for entry in found if entry.kind in _OF_WINDOWS and entry.window is not None}
    return tuple(sorted(seen, reverse=True))


def _champion_runs(found: list[LedgerEntry], champion: str | None, run: RunFacts) -> frozenset[str]:
    """Name the runs that made the champion: equal packages of several runs are one version."""
    about = [entry for entry in found if champion is not None and entry.subject == champion]
    registered = [entry.payload.get("run_id") for entry in about if entry.kind is EntryKind.REGISTRATION]
    evaluated = [
        entry.payload.get("evaluated_run_id") for entry in about if entry.kind is EntryKind.PROMOTION
    ]
    return frozenset(str(one) for one in [*registered, *evaluated, run.run_id] if one)


def _run(model_name: str, champion: str | None, services: Services) -> RunFacts:
    """Ask MLflow about the champion's run; what can't be asked is not known, and that is said."""
    from airflow_mlops.integrations.mlflow import Registry

    if champion is None:
        return RunFacts(trouble="nothing was promoted")
    if not services.tracking_uri:
        return RunFacts(trouble="MLflow was not asked: set AIRFLOW_MLOPS_TRACKING_URI")
    try:
        registry = Registry.connect(services)
        return _read_run(registry, registry.version(model_name, champion).run_id)
    except (MLOpsError, ValueError, LookupError, TypeError) as err:  # the latter: artifacts of another shape
        return RunFacts(trouble=f"MLflow could not be asked: {err}")


def _read_run(registry: Registry, run_id: str) -> RunFacts:
    tags = registry.run_tags(run_id)
    importances = _artifact(registry, run_id, "importance.json")
    rows = _artifact(registry, run_id, "rows.json")
    commit = tags.get("airflow_mlops.git_commit")
    return RunFacts(
        run_id=run_id,
        git_commit=commit if commit and commit != "unknown" else None,
        git_clean=tags.get("airflow_mlops.git_dirty") == "false",
        importances={
            str(item["name"]): (float(item["increase"]), float(item["standard_deviation"]))
            for item in importances
        },
        explained_rows=len([row for row in rows if row.get("contributions")]),
    )


def _artifact(registry: Registry, run_id: str, name: str) -> list[Any]:
    """Read a list of the explanation; empty where there is none."""
    data = registry.read_artifact(run_id, f"{_EXPLANATION}/{name}")
    found: list[Any] = json.loads(data) if data is not None else []
    return found
