"""Copies of models for MLflow's own loaders, beside the packages that are served."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.model.installed import packages_of
from airflow_mlops.core.model.package import file_digest
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.integrations.mlflow.connection import Connected, translated

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Tag of a logged model: digest of all its files, as they were when training stored them.
COPY_DIGEST_TAG = "airflow_mlops.copy_digest"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCopy:
    """A copy that was stored.

    :param model_id: the logged model's id.
    :param digest: of all its files.
    """

    model_id: str
    digest: str


class Copies(Connected):
    """Logged models: scikit-learn files for notebooks, which nothing here serves or compares with."""

    def log_model(
        self,
        experiment_id: str,
        run_id: str,
        pipeline: Any,
        *,
        name: str,
        features: Any,
        example: Any,
        trusted: Sequence[str],
    ) -> ModelCopy:
        """Store the pipeline as an MLflow model, so that ``mlflow.pyfunc.load_model`` works in a notebook.

        Requirements are given, not inferred: inference starts a process and costs 14 s.

        :param pipeline: takes rows as they come, see :func:`~airflow_mlops.integrations.sklearn.with_served_inputs`: MLflow's
            loaders hand them over as they are.
        :param features: rows that tell the signature.
        :param example: rows that are stored with it.
        :param trusted: types in the pipeline that skops asks about. MLflow's loaders trust what is listed, so each must be
            vouched for by somebody else than the pipeline.
        """
        import mlflow.sklearn
        from mlflow.models import infer_signature

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            mlflow.sklearn.save_model(
                pipeline,
                str(folder),
                serialization_format="skops",
                skops_trusted_types=list(trusted),
                signature=infer_signature(features.head(100), pipeline.predict(features.head(100))),
                input_example=example,
                pip_requirements=pinned_requirements(trusted),
            )
            digest = _folder_digest(folder)
            with translated(f"log model to run {run_id}"):
                self._fail_models(experiment_id, run_id)  # of a former try, while MLflow was going away
                logged = self.client.create_logged_model(
                    experiment_id, name=name, source_run_id=run_id, tags={COPY_DIGEST_TAG: digest}
                )
                self.client.log_model_artifacts(logged.model_id, str(folder))
                self.client.finalize_logged_model(logged.model_id, "READY")
        return ModelCopy(model_id=str(logged.model_id), digest=digest)

    def download_model(self, model_id: str, destination: Path, *, digest: str | None = None) -> Path:
        """Download a copy and see that every file is the one that training stored; nothing is loaded.

        :param destination: folder, made when missing; better an empty one.
        :param digest: digest of the copy from the training's result, which does not come from MLflow; ``None`` takes the tag
            of the logged model, which whoever may write to MLflow may change as well.
        :returns: the folder, for ``mlflow.sklearn.load_model``.
        :raises ArtifactIntegrityError: a file was changed, added or removed, or there is no digest to compare with.
        :raises ModelVersionNotFoundError: there is no such logged model.
        """
        from mlflow.artifacts import download_artifacts

        with translated(f"logged model {model_id}"):
            logged = self.client.get_logged_model(model_id)
            expected = digest or logged.tags.get(COPY_DIGEST_TAG)
            if expected is None:
                raise ArtifactIntegrityError(
                    f"logged model {model_id} has no tag {COPY_DIGEST_TAG}: it was not stored by TrainModelOperator, or by "
                    "an older one; give the digest, or train again"
                )
            destination.mkdir(parents=True, exist_ok=True)
            folder = Path(
                download_artifacts(
                    artifact_uri=logged.artifact_location,
                    dst_path=str(destination),
                    tracking_uri=self.tracking_uri,
                )
            )
        found = _folder_digest(folder)
        if found != expected:
            raise ArtifactIntegrityError(
                f"the files of logged model {model_id} have digest {found}, training stored {expected}: they were changed in "
                "MLflow. Do not load them; train again, or use the package of the run"
            )
        return folder


def pinned_requirements(types: Sequence[str]) -> list[str]:
    """Pin what a notebook needs to load the model: scikit-learn, skops, and the packages of other types in it.

    A module of your own belongs to no package and can't be pinned.
    """
    modules = {name.partition(".")[0] for name in types}
    needed = {"scikit-learn", "skops"} | {name for module in modules for name in packages_of(module)}
    return [f"{name}=={version(name)}" for name in sorted(needed)]


def _folder_digest(folder: Path) -> str:
    """Digest of every file below a folder, by path: one more, one less or one renamed is another digest."""
    files = {
        path.relative_to(folder).as_posix(): file_digest(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
    return f"sha256:{file_digest(canonical_json(files).encode())}"
