"""Register: a finished run's package becomes a model version; the same package twice gives the same version."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.model.model_card import Change, describe_model
from airflow_mlops.core.model.signing import PackageSignature, SigningKey
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    ConnectionConfigError,
    ModelVersionNotFoundError,
)
from airflow_mlops.integrations.mlflow import (
    CARD_TAG,
    DESCRIPTION_CHARACTERS,
    METRIC_TAGS,
    RECIPE_TAG,
    SIGNATURE_TAG,
    TAG_CHARACTERS,
    TRAINED_UNTIL_TAG,
    Registry,
    TrainingRun,
)
from airflow_mlops.ledger import Ledger
from airflow_mlops.ledger.lineage import CHAMPION
from airflow_mlops.serving.package import read_package
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.registry.aliases import (
    point_to_newest,
    require_movable,
    resolve_alias,
    set_to_newest,
)
from airflow_mlops.steps.registry.provenance import is_package_of, require_noted

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.page import Page
    from airflow_mlops.integrations.mlflow import RegisteredVersion
    from airflow_mlops.services import Services

#: Folder of the run's artifacts with the card and the verdict it was registered on.
CARD_FOLDER = "model_card"
CARD_FILE, PAGE_FILE, VERDICT_FILE = "model_card.md", "model_card.html", "evaluation.json"

#: The result goes through XCom.
_MAXIMUM_CHANGES = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisterSpec:
    """What to register.

    :param model_name: registered model; created when missing.
    :param run_id: MLflow run that holds the package.
    :param package_digest: digest the package must have.
    :param model_id: MLflow logged model of the same run, which ``mlflow.pyfunc`` loads; ``None``: the run has none, and the
        version's source is its package.
    :param alias: set on the version, unless a newer one has it; ``None`` sets none. ``champion`` and ``previous`` are not set here.
    :param evaluation: result of the evaluation, for the tags and the model card.
    :param vouched_by: who vouches for a package of which the ledger does not know that a training made it, such as one from
        another Airflow; only what is vouched for is signed.
    :param actor: who registers (Dag, run and task, or a person), for the ledger.
    """

    model_name: str
    run_id: str
    package_digest: str
    model_id: str | None = None
    alias: str | None = "challenger"
    evaluation: dict[str, Any] | None = None
    vouched_by: str | None = None
    actor: str = "register"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisterResult:
    """The version.

    :param signed_by: id of the key it is signed with; ``None`` when it is not.
    :param vouched_by: who vouched for it, where the ledger did not.
    :param version_url: its page in MLflow.
    :param card_url: its model card.
    :param changes: parameters of the training that were others for the champion, at most 40.
    :param evaluation_digest: of the evaluation it was registered with; ``None``: without one.
    """

    model_name: str
    model_version: str
    run_id: str
    package_digest: str
    signed_by: str | None
    vouched_by: str | None
    version_url: str
    card_url: str
    changes: tuple[Change, ...]
    evaluation_digest: str | None = None


def run(spec: RegisterSpec, services: Services) -> RegisterResult:
    """Verify the package, then register it with its card. Running it again, also after a crash, gives the same version.

    :raises ArtifactIntegrityError: the stored package is not the one with ``package_digest``; or it is to be signed, and
        neither the ledger nor a person vouches for it.
    :raises ModelVersionNotFoundError: the run has no package, or was deleted before it was registered.
    :raises ConnectionConfigError: signatures are asked for, or the model is a pickle, and there is no key to sign with.
    :raises ValueError: ``alias`` is not one that a registration sets, or the evaluation is about another package.
    """
    if spec.alias is not None:
        require_movable(spec.alias, registering=True)
    signature = _sign(spec, services)
    registry = Registry.connect(services)
    _require_own(spec, registry, services)
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_package(spec.run_id, Path(temporary))
        manifest = read_package(folder, expected_digest=spec.package_digest)
    if manifest.serving_form == "pickle" and signature is None:
        raise ConnectionConfigError(
            f"run {spec.run_id} was not registered as {spec.model_name}: its model is a pickle, which nothing loads without a "
            "signature, and there is no key to sign with. Put the private key into the signing connection's Password, or train "
            "without allow_pickle"
        )
    training = registry.training_run(spec.run_id)
    if training.is_deleted and registry.find_package(spec.model_name, spec.package_digest) is None:
        raise ModelVersionNotFoundError(
            f"run {spec.run_id} was deleted in MLflow, and its package was not registered as {spec.model_name}: the version would go "
            f"with the run. Restore it (mlflow runs restore --run-id {spec.run_id}), or train again"
        )
    changes = _changes(spec, registry, training, services)
    card = describe_model(
        manifest,
        model_name=spec.model_name,
        run_id=spec.run_id,
        package_digest=spec.package_digest,
        evaluation=spec.evaluation,
        training=training.params,
        changes=changes,
        signed_by=signature.key_id if signature else None,
    )
    # Without an evaluation nothing is known that a version which is there does not say already.
    keep = spec.evaluation is None
    if not (keep and registry.find_package(spec.model_name, spec.package_digest)):
        # Before the version: whoever sees the version finds its card.
        _upload(registry, spec.run_id, card, spec.evaluation)
    card_url = _artifact_url(registry, training, spec.run_id, PAGE_FILE)
    version = registry.register(
        spec.model_name,
        run_id=spec.run_id,
        model_id=spec.model_id,
        package_digest=spec.package_digest,
        tags={
            **_facts(manifest),
            **({SIGNATURE_TAG: signature.to_text()} if signature else {}),
        },
        verdict={
            **_verdict(spec.evaluation, _artifact_url(registry, training, spec.run_id, VERDICT_FILE)),
            CARD_TAG: card_url,
        },
        description=card.to_markdown(DESCRIPTION_CHARACTERS),
        keep_verdict=keep,
    )
    if spec.alias is not None:
        _point(spec, spec.alias, version, registry, services)
    signed = version.package_signature()
    return RegisterResult(
        model_name=spec.model_name,
        model_version=version.model_version,
        run_id=version.run_id,
        package_digest=version.package_digest,
        signed_by=signed.key_id if signed else None,
        vouched_by=spec.vouched_by,
        version_url=registry.version_url(version),
        card_url=version.card_url or card_url,
        changes=changes,
        evaluation_digest=_digest(spec.evaluation),
    )


def _point(
    spec: RegisterSpec, alias: str, version: RegisteredVersion, registry: Registry, services: Services
) -> None:
    """Set the alias where its owner is: in the ledger, once it was promoted there, or else in MLflow; never back to an older version."""
    if services.ledger_url is not None:
        with Ledger.open(services.ledger_url) as ledger:
            if point_to_newest(
                registry, ledger, model_name=spec.model_name, alias=alias, version=version, actor=spec.actor
            ):
                return
    set_to_newest(registry, alias, version)


def _sign(spec: RegisterSpec, services: Services) -> PackageSignature | None:
    """Vouch for the package; ``None`` where nothing is signed."""
    if services.signing_key:
        require_noted(
            services,
            run_id=spec.run_id,
            package_digest=spec.package_digest,
            vouched_by=spec.vouched_by,
        )
        key = SigningKey.parse(services.signing_key)
        return key.sign(model_name=spec.model_name, package_digest=spec.package_digest)
    if services.signing_public_keys:
        raise ConnectionConfigError(
            f"{spec.model_name} was not registered: versions must be signed here, and the signing connection holds public "
            "keys only. Put the private key into its Password where models are registered"
        )
    return None


def _require_own(spec: RegisterSpec, registry: Registry, services: Services) -> None:
    """Refuse the evaluation of another package: the version's tags and its card would lie."""
    if spec.evaluation is None:
        return
    about, name = spec.evaluation.get("run_id"), spec.evaluation.get("model_name")
    if name != spec.model_name:
        why = f"compares with the champion of {name!r}"
    elif not about:
        why = "does not say which run it is about"
    elif not is_package_of(
        about, package_digest=spec.package_digest, holder=spec.run_id, registry=registry, services=services
    ):
        why = f"is about run {about}, which holds another package"
    else:
        return
    raise ValueError(
        f"run {spec.run_id} was not registered as {spec.model_name}: its evaluation {why}. Give the evaluation of this very "
        "training, or none"
    )


def _changes(
    spec: RegisterSpec, registry: Registry, training: TrainingRun, services: Services
) -> tuple[Change, ...]:
    """Compare the parameters of the training with those of the champion's."""
    try:
        champion = resolve_alias(registry, services, spec.model_name, CHAMPION)
        before = registry.training_run(champion.run_id).params
    # There is none yet, its run was deleted, or so was all of the model.
    except (ModelVersionNotFoundError, ArtifactIntegrityError):
        return ()
    if champion.run_id == spec.run_id:
        return ()
    names = sorted({*before, *training.params})
    changed = [
        Change(name=name, champion=_short(before.get(name)), challenger=_short(training.params.get(name)))
        for name in names
        if before.get(name) != training.params.get(name)
    ]
    return tuple(changed[:_MAXIMUM_CHANGES])


def _short(text: str | None) -> str | None:
    return None if text is None else text[:200]


def _facts(manifest: PackageManifest) -> dict[str, str]:
    """Give the tags one may search versions by, and those that say what is in the package."""
    trained = manifest.trained_on
    facts = {
        "airflow_mlops.dataset_uri": trained.dataset_uri,
        "airflow_mlops.dataset_version": str(trained.dataset_version),
        "airflow_mlops.dataset_digest": trained.dataset_digest,
        **_age(manifest),
        "airflow_mlops.serving_form": manifest.serving_form,
        "airflow_mlops.serving_reason": manifest.serving_reason,
        "airflow_mlops.input_example": canonical_json(manifest.known_rows[0]),
        "airflow_mlops.files": canonical_json(manifest.files),
    }
    # JSON that is cut off is none; all of it is in package.json.
    return {name: value for name, value in facts.items() if len(value) <= TAG_CHARACTERS}


def _age(manifest: PackageManifest) -> dict[str, str]:
    """Give the tags by which models of different age are found, see :mod:`airflow_mlops.steps.challengers`."""
    trained = manifest.trained_on
    if trained.recipe is None or trained.window_end is None:
        return {}
    return {RECIPE_TAG: trained.recipe, TRAINED_UNTIL_TAG: trained.window_end.isoformat()}


def _verdict(evaluation: dict[str, Any] | None, url: str) -> dict[str, str]:
    """Give the tags of the verdict, and where all of it is."""
    if evaluation is None:
        return {"airflow_mlops.verdict": "none"}
    report = evaluation.get("report") or {}
    measured = [item for item in (report.get("deciding"), *(report.get("others") or ())) if item]
    values = {f"{METRIC_TAGS}{item['metric']}": f"{item['challenger']['value']:.6g}" for item in measured}
    return {
        "airflow_mlops.verdict": str(evaluation.get("verdict") or "none"),
        "airflow_mlops.verdict_reason": str(evaluation.get("reason") or ""),
        "airflow_mlops.evaluation": url,
        **values,
    }


def _digest(evaluation: dict[str, Any] | None) -> str | None:
    """Name an evaluation."""
    if evaluation is None:
        return None
    return f"sha256:{hashlib.sha256(canonical_json(evaluation).encode()).hexdigest()}"


def _upload(registry: Registry, run_id: str, card: Page, evaluation: dict[str, Any] | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / CARD_FILE).write_text(card.to_markdown())
        (folder / PAGE_FILE).write_text(card.to_html())
        if evaluation is not None:
            (folder / VERDICT_FILE).write_text(canonical_json(evaluation))
        registry.upload(run_id, folder, CARD_FOLDER)


def _artifact_url(registry: Registry, training: TrainingRun, run_id: str, name: str) -> str:
    return registry.run_url(training.experiment_id, run_id, f"{CARD_FOLDER}/{name}")


STEP = Step(name="register", spec=RegisterSpec, result=RegisterResult, run=run)
