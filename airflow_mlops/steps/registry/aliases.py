"""Aliases: where the ledger says they point, shown in MLflow, which is what people and services look at."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import ArtifactIntegrityError, ModelVersionNotFoundError, PromotionConflictError
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.ledger.lineage import CHAMPION, PREVIOUS, Pointer, aliases_to_show

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_mlops.integrations.mlflow import RegisteredVersion, Registry
    from airflow_mlops.services import Services

log = logging.getLogger(__name__)

#: What MLflow takes for an alias, and what of it names versions already. It takes longer ones, too; the ledger does not.
_SPELLING, _TAKEN = re.compile(r"[\w-]{1,100}"), re.compile(r"latest|[vV]\d+")


def require_movable(alias: str, *, registering: bool = False) -> None:
    """Refuse an alias that follows from others, one that MLflow takes for none or, when a version is registered, the one that must be earned.

    :raises ValueError: saying who moves it, or how an alias is spelled.
    """
    if _TAKEN.fullmatch(alias) or not _SPELLING.fullmatch(alias):
        raise ValueError(
            f"alias {alias!r} is refused by MLflow or the ledger: give letters, digits, - and _, 100 at most, and neither 'latest' nor the "
            "number of a version such as 'v7'"
        )
    if alias == PREVIOUS:
        raise ValueError(
            f"alias {PREVIOUS!r} follows {CHAMPION!r} by itself and is not moved; promote, or roll back"
        )
    if registering and alias == CHAMPION:
        raise ValueError(
            f"alias {CHAMPION!r} is not set by a registration; promote the version after it is registered"
        )


def point_to_newest(
    registry: Registry, ledger: Ledger, *, model_name: str, alias: str, version: RegisteredVersion, actor: str
) -> bool:
    """Point an alias that the ledger owns at the version registered last; it owns those that were ever promoted.

    A retry that comes late, and an old version that is signed again, leave it where it is.

    :returns: whether the ledger owns it; MLflow alone says where the others point.
    """
    number = version.model_version
    while True:
        current = ledger.aliases(model_name).get(alias)
        if current is None:
            return False
        if _is_newer(current, number) and _is_there(registry, ledger, model_name, alias):
            show_aliases(registry, ledger, model_name)
            return True
        try:
            ledger.move_alias(
                model_name=model_name,
                alias=alias,
                model_version=number,
                expected_version=current,
                entry=LedgerEntry(
                    kind=EntryKind.PROMOTION,
                    key=f"{model_name}|{alias}|{current}|{number}",
                    model_name=model_name,
                    window=None,
                    subject=number,
                    summary=f"version {number} became {alias} of {model_name}: it was registered last",
                    payload={
                        "alias": alias,
                        "model_version": number,
                        "package_digest": version.package_digest,
                        "previous_version": current,
                    },
                    actor=actor,
                    recorded_at=datetime.now(UTC),
                ),
            )
        except PromotionConflictError:  # moved meanwhile: who comes last was registered last
            continue
        show_aliases(registry, ledger, model_name)
        return True


def set_to_newest(registry: Registry, alias: str, version: RegisteredVersion) -> None:
    """Point an alias of MLflow's own at the version registered last, and not back from a newer one."""
    current = registry.aliases(version.model_name).get(alias)
    if current is None or not _is_newer(current, version.model_version):
        registry.set_alias(version.model_name, alias, version.model_version)


def _is_newer(current: str, number: str) -> bool:
    return int(current) > int(number)


def _is_there(registry: Registry, ledger: Ledger, model_name: str, alias: str) -> bool:
    try:
        _version_there(registry, model_name, alias, aliases_to_show(ledger, model_name)[alias])
    except (ModelVersionNotFoundError, ArtifactIntegrityError):
        return False
    return True


def show_aliases(registry: Registry, ledger: Ledger, model_name: str) -> None:
    """Point MLflow's aliases where the ledger says.

    MLflow has no compare-and-set, so a process that was slow could write what is no longer true: after writing, the ledger
    is read again, and whoever writes last has read last. A process that is killed leaves the rest to the next one.
    """
    wanted = aliases_to_show(ledger, model_name)
    while True:
        shown = registry.aliases(model_name) if wanted else {}
        for alias, pointer in wanted.items():
            _show(registry, model_name, alias, pointer, shown.get(alias))
        if CHAMPION in wanted and PREVIOUS in shown and PREVIOUS not in wanted:
            registry.remove_alias(model_name, PREVIOUS)
        newest = aliases_to_show(ledger, model_name)
        if newest == wanted:
            return
        wanted = newest


def _show(registry: Registry, model_name: str, alias: str, pointer: Pointer, shown: str | None) -> None:
    """Point one alias of MLflow at what it names, or at nothing where that is gone."""
    try:
        _version_there(registry, model_name, alias, pointer)
        if shown != pointer.model_version:
            registry.set_alias(model_name, alias, pointer.model_version)
    except ModelVersionNotFoundError:
        log.warning(
            "%s of %s is version %s, which MLflow no longer has", alias, model_name, pointer.model_version
        )
        # It would name a version that is not the one to go back to.
        if alias == PREVIOUS and shown is not None:
            registry.remove_alias(model_name, alias)
    except ArtifactIntegrityError as err:
        log.warning("%s is not shown: %s", alias, err)
        if shown is not None:
            registry.remove_alias(model_name, alias)


def resolve_alias(registry: Registry, services: Services, model_name: str, alias: str) -> RegisteredVersion:
    """Give the version an alias points at: what the ledger says where it owns the alias, whatever MLflow shows, or else MLflow.

    :raises ModelVersionNotFoundError: it points at none, or MLflow does not have the one the ledger names; or it is ``previous``, and
        the ledger knows of no way back.
    :raises ArtifactIntegrityError: the version of that number in MLflow is another one than got the alias.
    """
    if services.ledger_url is not None:
        with Ledger.open(services.ledger_url) as ledger:
            pointers = aliases_to_show(ledger, model_name)
        _require_way_back(model_name, alias, pointers)
        if alias in pointers:
            return _version_there(registry, model_name, alias, pointers[alias])
    return registry.version_by_alias(model_name, alias)


def move_clock(given: datetime | None) -> Callable[[], datetime]:
    """Give the clock of a move: a task may wait long for its pod, so a move is made when the ledger makes it.

    :param given: another time instead, such as that of a past that is lived through again.
    """
    return (lambda: datetime.now(UTC)) if given is None else (lambda: given)


def find_rival(
    registry: Registry, services: Services, model_name: str, alias: str
) -> RegisteredVersion | None:
    """Give the version an alias points at, after completing a promotion that was cut short; ``None`` when there is none yet.

    :raises ModelVersionNotFoundError: the ledger has one and MLflow does not, or not even the model: that is no first model.
    :raises ArtifactIntegrityError: the version of that number in MLflow is another one than got the alias.
    """
    if services.ledger_url is not None:
        with Ledger.open(services.ledger_url) as ledger:
            pointers = aliases_to_show(ledger, model_name)
            try:
                show_aliases(registry, ledger, model_name)
            except ModelVersionNotFoundError as err:
                raise _model_gone(model_name, pointers) from err
            pointers = aliases_to_show(ledger, model_name)
        _require_way_back(model_name, alias, pointers)
        if alias in pointers:
            return _version_there(registry, model_name, alias, pointers[alias])
    return registry.find_alias(model_name, alias)


def _require_way_back(model_name: str, alias: str, pointers: Mapping[str, Pointer]) -> None:
    """Refuse what somebody called ``previous`` in MLflow: where the ledger has a champion, it alone knows the one before."""
    if alias == PREVIOUS and CHAMPION in pointers and PREVIOUS not in pointers:
        raise ModelVersionNotFoundError(
            f"{PREVIOUS} of {model_name} is no version: version {pointers[CHAMPION].model_version} is the first {CHAMPION} in the "
            "ledger, or all before it were taken back, whatever MLflow shows. Name a version"
        )


def _model_gone(model_name: str, pointers: Mapping[str, Pointer]) -> ModelVersionNotFoundError:
    champion = pointers.get(CHAMPION)
    number = f'"{champion.model_version}"' if champion else "None"
    return ModelVersionNotFoundError(
        f"MLflow has no model {model_name!r}, and the ledger knows versions of it: it was deleted or renamed. Give it its name back; "
        "or, to begin anew, register the training without an evaluation, promote that version by hand "
        f'(evaluation={{"champion_version": {number}, "reason": "<why>"}}), and deploy'
    )


def _version_there(registry: Registry, model_name: str, alias: str, pointer: Pointer) -> RegisteredVersion:
    """Look up the version that the ledger names, and see that it is the one that got the alias."""
    number = pointer.model_version
    try:
        version = registry.version(model_name, number)
    except ModelVersionNotFoundError as err:
        raise ModelVersionNotFoundError(
            f"{alias} of {model_name} is version {number} in the ledger, and MLflow has no such version any more. "
            f"{_another(number)}"
        ) from err
    if pointer.package_digest not in {None, version.package_digest}:
        raise ArtifactIntegrityError(
            f"{alias} of {model_name} is version {number} with package {pointer.package_digest} in the ledger, and version {number} "
            f"in MLflow holds {version.package_digest}: the model was deleted and made anew, or its tag was changed. "
            f"{_another(number)}"
        )
    return version


def _another(number: str) -> str:
    return (
        "Roll back to a version that is there (RollBackModelOperator with model_version), or promote one by hand: "
        f'evaluation={{"champion_version": "{number}", "reason": "<why>"}}'
    )
