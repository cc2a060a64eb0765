"""Artifacts of runs: files up, texts and model packages down, and what a download failed of."""

from __future__ import annotations

import errno
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.core.model.package import MAXIMUM_PACKAGE_BYTES, file_digest
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    ModelVersionNotFoundError,
    RegistryUnavailableError,
    StorageError,
)
from airflow_mlops.integrations.mlflow.connection import Connected, translated

if TYPE_CHECKING:
    from mlflow.entities import FileInfo

    from airflow_mlops.exceptions import MLOpsError

#: Folder of the run's artifacts that holds the model package.
PACKAGE_FOLDER = "package"
#: And with that of its twin that was measured, where the model was fitted again on all rows.
TWIN_FOLDER = "twin"

# What the operating system says when a file can't be written here; MLflow passes on only the text of it.
_LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


class Artifacts(Connected):
    """Files that runs hold."""

    def upload(self, run_id: str, folder: Path, artifact_path: str) -> None:
        """Upload a folder to the run's artifacts."""
        with translated(f"upload to run {run_id}"):
            self.client.log_artifacts(run_id, str(folder), artifact_path)

    def write_text(self, run_id: str, artifact_file: str, text: str) -> None:
        """Store a text among the run's artifacts, with its digest as a tag."""
        with translated(f"upload to run {run_id}"):
            self.client.log_text(run_id, text, artifact_file)
            self.client.set_tag(run_id, _digest_tag(artifact_file), file_digest(text.encode()))

    def read_text(self, run_id: str, artifact_file: str) -> str:
        """Read what :meth:`write_text` stored.

        :raises ArtifactIntegrityError: it is not there any more, or is another text.
        """
        data = self.read_artifact(run_id, artifact_file)
        with translated(f"run {run_id}"):
            run = self.client.get_run(run_id)
        if data is None or file_digest(data) != run.data.tags.get(_digest_tag(artifact_file)):
            raise ArtifactIntegrityError(
                f"{artifact_file} of run {run_id} is {'missing' if data is None else 'not what was stored'}; "
                "delete the run in MLflow, and the work is done again"
            )
        return data.decode()

    def read_artifact(self, run_id: str, artifact_file: str) -> bytes | None:
        """Read a file of the run's artifacts as it is, without a look at who wrote it; ``None`` when there is none.

        :raises ModelVersionNotFoundError: there is no such run.
        """
        from mlflow.artifacts import download_artifacts

        folder, _, name = artifact_file.rpartition("/")
        if name not in {Path(item.path).name for item in self.list_folder(run_id, folder)}:
            return None
        with tempfile.TemporaryDirectory() as temporary, translated(f"{artifact_file} of run {run_id}"):
            root = self.client.get_run(run_id).info.artifact_uri
            path = download_artifacts(
                artifact_uri=f"{root}/{artifact_file}", dst_path=temporary, tracking_uri=self.tracking_uri
            )
            return Path(path).read_bytes()

    def list_folder(self, run_id: str, artifact_folder: str) -> list[FileInfo]:
        """List a folder of the run's artifacts; empty when there is none.

        :raises ModelVersionNotFoundError: there is no such run.
        """
        from mlflow.artifacts import list_artifacts

        with translated(f"run {run_id}"):
            root = self.client.get_run(run_id).info.artifact_uri
            # By its own address: by run, MLflow takes a folder for a logged model of the same name.
            found: list[FileInfo] = list_artifacts(
                artifact_uri=f"{root}/{artifact_folder}", tracking_uri=self.tracking_uri
            )
        return found

    def download_package(
        self, run_id: str, destination: Path, *, artifact_folder: str = PACKAGE_FOLDER
    ) -> Path:
        """Download the model package of a run.

        :param artifact_folder: where it is; that of its twin, for example.
        :raises ModelVersionNotFoundError: when there is no such run, or it has no package.
        :raises ArtifactIntegrityError: it is too large to be one, or holds a folder.
        :raises StorageError: the package can't be written here.
        :raises RegistryUnavailableError: the server failed, or went away meanwhile.
        """
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        with translated(f"run {run_id}"):
            root = self.client.get_run(run_id).info.artifact_uri
        items = self.list_folder(run_id, artifact_folder)
        inside = next((Path(item.path).name for item in items if item.is_dir), None)
        if inside is not None:  # its files would be downloaded as well, and are in no sum
            raise ArtifactIntegrityError(
                f"the package of run {run_id} holds a folder {inside!r}, and packages hold none. It was not downloaded"
            )
        size = sum(item.file_size or 0 for item in items)
        if size > MAXIMUM_PACKAGE_BYTES:
            raise ArtifactIntegrityError(
                f"the package of run {run_id} has {size} bytes; at most {MAXIMUM_PACKAGE_BYTES} are loaded. "
                "It was not downloaded"
            )
        try:
            # By its own address: asked by run, MLflow calls every failure a path that is not correct.
            return Path(
                download_artifacts(
                    artifact_uri=f"{root}/{artifact_folder}",
                    dst_path=str(destination),
                    tracking_uri=self.tracking_uri,
                )
            )
        except (MlflowException, OSError) as err:
            raise self._download_error(run_id, artifact_folder, destination, err) from err

    def _download_error(
        self, run_id: str, artifact_folder: str, destination: Path, err: Exception
    ) -> MLOpsError:
        """Tell what a download failed of: this machine's disk, a package that is not there, or the server."""
        text = " ".join(str(err).split())[:600]
        if any(int(number) in _LOCAL_ERRORS for number in re.findall(r"\[Errno (\d+)\]", text)):
            return StorageError(
                f"could not write the model package of run {run_id} to {destination}: {text}. "
                "Check free space and write permission, then run the task again"
            )
        if not self.list_folder(run_id, artifact_folder):
            return ModelVersionNotFoundError(
                f"run {run_id} at {self.tracking_uri} has no artifact folder {artifact_folder!r}: "
                f"was it trained by TrainModelOperator? ({text})"
            )
        return RegistryUnavailableError(
            f"MLflow at {self.tracking_uri} did not give the model package of run {run_id}: {text}"
        )


def _digest_tag(artifact_file: str) -> str:
    return f"airflow_mlops.{Path(artifact_file).stem}_digest"
