"""Which table versions the models learned from that are in use: their rows are needed to train them again, or to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from airflow_mlops.core.data.dataset import VersionInUse
from airflow_mlops.ledger.entries import EntryKind
from airflow_mlops.ledger.tables import aliases, entries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlops.ledger.entries import LedgerEntry
    from airflow_mlops.ledger.store import Ledger

CHAMPION = "champion"
#: Points at the version that one step back leads to; it follows from the ledger and is never moved by itself.
PREVIOUS = "previous"
#: Of a model, so many of the versions registered last may become champion.
_CANDIDATES = 20


def versions_in_use(ledger: Ledger) -> list[VersionInUse]:
    """List what the models under an alias learned from, and those registered since the champion was, which may follow it.

    :returns: of the models whose training and registration are in the ledger; MLflow alone knows of others.
    """
    with ledger._reading() as connection:
        models = connection.execute(sa.union(sa.select(aliases.c.model_name), _registered())).scalars().all()
    return [
        VersionInUse(
            model_name=model,
            model_version=version,
            alias=alias,
            dataset_uri=str(dataset["uri"]),
            dataset_version=int(dataset["version"]),
        )
        for model in sorted(models)
        for alias, version in _versions(ledger, model)
        if (dataset := _learned_from(ledger, model, version)) is not None
    ]


class Pointer(NamedTuple):
    """What an alias names.

    :param package_digest: of the package that was moved there; ``None``: the move does not say.
    """

    model_version: str
    package_digest: str | None = None


def aliases_to_show(ledger: Ledger, model_name: str) -> dict[str, Pointer]:
    """Give a model's aliases and what they name, the last one to be written first: who sees the new champion finds the previous one."""
    before = ledger.standing_moves(model_name, CHAMPION)[:-1]
    wanted = {PREVIOUS: pointer_of(before[-1])} if before else {}
    for alias in ledger.aliases(model_name):
        move = ledger.last_move(model_name, alias)
        if move is not None:
            wanted[alias] = pointer_of(move)
    return wanted


def pointer_of(move: LedgerEntry) -> Pointer:
    """Tell where a move put its alias."""
    return Pointer(str(move.payload["model_version"]), move.payload.get("package_digest"))


def _registered() -> sa.Select[tuple[str]]:
    return sa.select(entries.c.model_name).where(entries.c.kind == str(EntryKind.REGISTRATION))


def _versions(ledger: Ledger, model_name: str) -> Iterator[tuple[str, str]]:
    """Give versions with the alias each is kept for."""
    pointers = {
        alias: pointer.model_version for alias, pointer in aliases_to_show(ledger, model_name).items()
    }
    yield from sorted(pointers.items())
    for version in _newest(ledger, model_name):
        if version == pointers.get(CHAMPION):
            return
        if version not in pointers.values():
            yield "challenger", version


def _newest(ledger: Ledger, model_name: str) -> list[str]:
    """List the versions that came last, the last one first: one that is signed or evaluated again came when it did the first time."""
    package = entries.c.payload["package_digest"].as_string()
    query = (
        sa.select(entries.c.subject)
        .where(entries.c.kind == str(EntryKind.REGISTRATION), entries.c.model_name == model_name)
        .group_by(entries.c.subject, package)
        .order_by(sa.func.min(entries.c.entry_id).desc())
        .limit(_CANDIDATES)
    )
    with ledger._reading() as connection:
        return list(dict.fromkeys(str(version) for version in connection.execute(query).scalars()))


def _learned_from(ledger: Ledger, model_name: str, version: str) -> dict[str, Any] | None:
    found = ledger.entries(kind=EntryKind.REGISTRATION, model_name=model_name, subject=version, limit=1)
    training = ledger.find(EntryKind.TRAINING, str(found[0].payload["run_id"])) if found else None
    return training.payload.get("dataset") if training else None
