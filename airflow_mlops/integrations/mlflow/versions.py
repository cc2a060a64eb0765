"""Model versions: the same package is one version, and aliases point at them."""

from __future__ import annotations

import logging
import random
import re
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow_mlops.core.model.signing import SIGNATURE_FILE, PackageSignature
from airflow_mlops.exceptions import ArtifactIntegrityError, ModelVersionNotFoundError
from airflow_mlops.integrations.mlflow.artifacts import PACKAGE_FOLDER, Artifacts
from airflow_mlops.integrations.mlflow.connection import translated
from airflow_mlops.integrations.mlflow.runs import PACKAGE_DIGEST_TAG

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

log = logging.getLogger(__name__)

RUN_ID_TAG = "airflow_mlops.run_id"
#: Tag of a model version: the package's signature as this model, see :mod:`airflow_mlops.core.model.signing`.
SIGNATURE_TAG = "airflow_mlops.package_signature"

#: Tags of a model version that was made by a recipe: which, and the first instant after its training rows.
RECIPE_TAG = "airflow_mlops.recipe"
TRAINED_UNTIL_TAG = "airflow_mlops.trained_until"

#: MLflow's databases cut longer ones off, or refuse them.
DESCRIPTION_CHARACTERS = 5000
TAG_CHARACTERS = 5000

#: Tags of a model version: the values its evaluation measured, by metric.
METRIC_TAGS = "airflow_mlops.metric."
#: Tag of a model version: the address of its model card.
CARD_TAG = "airflow_mlops.model_card"

# Source of a version that has a copy for MLflow's own loaders.
_COPY = "models:/"

# Of those who write the same row at once each round lets at least one through.
_WRITE_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """A model version as the registry knows it.

    :param signature: text of its package's signature; ``None`` when it was registered without a key.
    :param model_id: the copy for MLflow's own loaders; ``None`` when it has none.
    :param recipe: how it was made; ``None`` when it is no model of a recipe.
    :param trained_until: first instant after its training rows; ``None`` without a recipe.
    :param card_url: its model card; ``None`` when it has none.
    """

    model_name: str
    model_version: str
    run_id: str
    package_digest: str
    signature: str | None = None
    model_id: str | None = None
    recipe: str | None = None
    trained_until: datetime | None = None
    card_url: str | None = None

    def package_signature(self) -> PackageSignature | None:
        """Read the signature.

        :raises ArtifactIntegrityError: the tag holds none.
        """
        if self.signature is None:
            return None
        try:
            return PackageSignature.from_text(self.signature)
        except ValueError as err:
            raise ArtifactIntegrityError(
                f"tag {SIGNATURE_TAG} of {self.model_name} version {self.model_version} is no signature: {err}"
            ) from err


class Versions(Artifacts):
    """Registered models, their versions and aliases."""

    def register(
        self,
        model_name: str,
        *,
        run_id: str,
        model_id: str | None,
        package_digest: str,
        tags: Mapping[str, str],
        verdict: Mapping[str, str] | None = None,
        description: str,
        keep_verdict: bool = False,
    ) -> RegisteredVersion:
        """Create a version, or find the one that already holds this package, and write its tags and description.

        MLflow can't make a tag unique, so of two processes that register the same package at once both create a version.
        Numbers are given in order: whoever finds a lower one with the same package takes its own back.

        :param model_id: the copy for MLflow's own loaders; without one, or where it was deleted, the version's source is the run's
            package.
        :param tags: facts about it; a value longer than MLflow stores is cut off.
        :param verdict: tags of how it was judged, in place of those of an earlier verdict.
        :param keep_verdict: a version that is there keeps its verdict and description.
        """
        facts, judged = _storable(tags), _storable(verdict or {})
        wanted = {PACKAGE_DIGEST_TAG: package_digest, RUN_ID_TAG: run_id, **facts, **judged}
        text = description[:DESCRIPTION_CHARACTERS]
        with translated(f"register {model_name!r}"):
            self._ensure_model(model_name)
            standing = self._holding(model_name, package_digest)
            if not standing:
                copy = model_id if model_id and self._has_copy(model_id) else None
                created = _written(
                    self.client.create_model_version,
                    model_name,
                    source=f"{_COPY}{copy}" if copy else f"runs:/{run_id}/{PACKAGE_FOLDER}",
                    run_id=run_id,
                    model_id=copy,
                    tags=wanted,
                    description=text,
                )
                standing = self._holding(model_name, package_digest)
                if str(standing[0].version) != str(created.version):
                    _written(self.client.delete_model_version, model_name, created.version)
            number = str(standing[0].version)
            if keep_verdict:
                self._bring_up_to_date(standing[0], facts)
            else:
                self._bring_up_to_date(standing[0], facts | judged)
                for name in standing[0].tags:
                    if name.startswith(METRIC_TAGS) and name not in judged:
                        self._remove_tag(model_name, number, name)
                if standing[0].description != text:
                    _written(self.client.update_model_version, model_name, number, text)
            return _registered(self.client.get_model_version(model_name, number))

    def _has_copy(self, model_id: str) -> bool:
        """Tell whether a logged model is there; of one that is not MLflow's server makes no version, and says 500."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_logged_model(model_id)
        except MlflowException as err:
            if err.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning(
                "logged model %s was deleted in MLflow: the version has no copy for notebooks", model_id
            )
            return False
        return True

    def _bring_up_to_date(self, version: Any, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            if version.tags.get(name) != value:
                _written(self.client.set_model_version_tag, version.name, str(version.version), name, value)

    def _remove_tag(self, model_name: str, number: str, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            _written(self.client.delete_model_version_tag, model_name, number, name)
        except MlflowException as err:  # somebody else was faster
            if err.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def download_version(self, version: RegisteredVersion, destination: Path) -> Path:
        """Download the package of a version, with its signature beside it.

        :raises ModelVersionNotFoundError: when its run has no package.
        """
        folder = self.download_package(version.run_id, destination)
        if version.signature is not None:
            (folder / SIGNATURE_FILE).write_text(version.signature)
        return folder

    def _ensure_model(self, model_name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(model_name)
        except MlflowException:
            try:
                _written(self.client.create_registered_model, model_name)
            except MlflowException as err:  # somebody else was faster
                if err.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _holding(self, model_name: str, package_digest: str) -> list[Any]:
        """List the versions with this package, lowest number first."""
        # The server looks for it: a model may have thousands of versions, each with all of its tags.
        found = self.client.search_model_versions(
            f"name = {_quoted(model_name)} and tags.`{PACKAGE_DIGEST_TAG}` = {_quoted(package_digest)}"
        )
        return sorted(found, key=lambda item: int(item.version))

    def find_package(self, model_name: str, package_digest: str) -> RegisteredVersion | None:
        """Find the version that holds a package; ``None`` when there is none."""
        with translated(f"versions of {model_name!r}"):
            found = self._holding(model_name, package_digest)
        return _registered(found[0]) if found else None

    def version(self, model_name: str, model_version: str) -> RegisteredVersion:
        """Look a version up by number.

        :raises ModelVersionNotFoundError: naming the model and version.
        """
        with translated(f"model {model_name!r} version {model_version!r}"):
            return _registered(self.client.get_model_version(model_name, model_version))

    def version_by_alias(self, model_name: str, alias: str) -> RegisteredVersion:
        """Look a version up by alias.

        :raises ModelVersionNotFoundError: naming the model and alias.
        """
        with translated(f"model {model_name!r} alias {alias!r}"):
            return _registered(self.client.get_model_version_by_alias(model_name, alias))

    def find_alias(self, model_name: str, alias: str) -> RegisteredVersion | None:
        """Like :meth:`version_by_alias`, with ``None`` when there is no such model or alias."""
        try:
            return self.version_by_alias(model_name, alias)
        except ModelVersionNotFoundError:
            return None

    def made_by_recipe(self, model_name: str, *, limit: int = 100) -> list[RegisteredVersion]:
        """List the newest versions that were made by a recipe, newest first."""
        with translated(f"versions of {model_name!r}"):
            found = self.client.search_model_versions(
                f"name = {_quoted(model_name)}", max_results=limit, order_by=["version_number DESC"]
            )
        return [_registered(version) for version in found if version.tags.get(RECIPE_TAG)]

    def set_alias(self, model_name: str, alias: str, model_version: str) -> None:
        """Point an alias at a version. The ledger decides who may; MLflow has no compare-and-set."""
        with translated(f"model {model_name!r} alias {alias!r}"):
            _written(self.client.set_registered_model_alias, model_name, alias, model_version)

    def remove_alias(self, model_name: str, alias: str) -> None:
        """Let an alias point at nothing."""
        with translated(f"model {model_name!r} alias {alias!r}"):
            _written(self.client.delete_registered_model_alias, model_name, alias)

    def set_version_tag(self, model_name: str, model_version: str, name: str, value: str) -> None:
        """Write a tag of a version."""
        with translated(f"model {model_name!r} version {model_version!r}"):
            _written(self.client.set_model_version_tag, model_name, model_version, name, value)

    def aliases(self, model_name: str) -> dict[str, str]:
        """Give every alias of a model with the version it points at.

        :raises ModelVersionNotFoundError: there is no such model.
        """
        with translated(f"model {model_name!r}"):
            found = self.client.get_registered_model(model_name).aliases
        return {alias: str(version) for alias, version in found.items()}

    def version_url(self, version: RegisteredVersion) -> str:
        """Page of a model version."""
        name = quote(version.model_name, safe="")
        return f"{self.tracking_uri}/#/models/{name}/versions/{version.model_version}"


def _written(write: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Write to the registry, again when somebody else wrote the same row at the same time.

    MLflow looks whether a row is there and then inserts it. Who comes second breaks its database's uniqueness, which it
    answers with 400 BAD_REQUEST, and its client repeats only 408, 429 and 5xx. What is really wrong with a request is an
    INVALID_PARAMETER_VALUE.
    """
    from mlflow.exceptions import MlflowException

    for attempt in range(_WRITE_ATTEMPTS):
        try:
            return write(*arguments, **named)
        except MlflowException as err:
            if (
                err.error_code not in {"BAD_REQUEST", "TEMPORARILY_UNAVAILABLE"}
                or attempt + 1 == _WRITE_ATTEMPTS
            ):
                raise
        time.sleep(random.uniform(0.05, 0.2) * 2**attempt)  # noqa: S311  it only parts the writers
    raise AssertionError("unreachable")


def _registered(version: Any) -> RegisteredVersion:
    run_id = version.tags.get(RUN_ID_TAG) or version.run_id
    digest = version.tags.get(PACKAGE_DIGEST_TAG)
    if not run_id or not digest:
        raise ModelVersionNotFoundError(
            f"model {version.name!r} version {version.version} was not registered by RegisterModelOperator "
            f"(tag {PACKAGE_DIGEST_TAG} is missing); register the run again with it"
        )
    return RegisteredVersion(
        model_name=version.name,
        model_version=str(version.version),
        run_id=run_id,
        package_digest=digest,
        signature=version.tags.get(SIGNATURE_TAG),
        # MLflow's server does not give model_id back.
        model_id=version.source.removeprefix(_COPY) if version.source.startswith(_COPY) else None,
        recipe=version.tags.get(RECIPE_TAG),
        trained_until=datetime.fromisoformat(until)
        if (until := version.tags.get(TRAINED_UNTIL_TAG))
        else None,
        card_url=version.tags.get(CARD_TAG),
    )


def _storable(tags: Mapping[str, str]) -> dict[str, str]:
    return {_tag_name(name): value[:TAG_CHARACTERS] for name, value in tags.items()}


def _quoted(text: str) -> str:
    """Quote a text for one of MLflow's filters, which know no escape."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _tag_name(name: str) -> str:
    """Replace what MLflow does not take in the name of a tag, such as in a metric's import path."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]
