"""The model that travels in a Bento: how it gets there, and out of it into a folder the service may write to."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from airflow_mlops.core.rollouts.desired_state import DesiredState
from airflow_mlops.serving.files import storage_errors, write_whole
from airflow_mlops.serving.reconciler import DESIRED_FILE

log = logging.getLogger(__name__)

SERVING_DIR_VARIABLE = "AIRFLOW_MLOPS_SERVING_DIR"

#: Folder inside the Bento, beside the package ``airflow_mlops``.
BUNDLE_FOLDER = "bundle"


def bundle(package_folder: Path, desired: DesiredState, destination: Path) -> None:
    """Lay out a verified package and the state that asks for it as a serving folder has them."""
    target = destination / desired.folder(desired.stable)
    target.mkdir(parents=True)
    for file in sorted(package_folder.iterdir()):
        shutil.copyfile(file, target / file.name)
    (destination / DESIRED_FILE).write_bytes(desired.to_bytes())


def unpack(source: Path) -> Path:
    """Bring a bundle into the serving folder, and say which folder that is to this process and those it starts.

    What a Bento brings is asked for, whatever the folder asked for before: an image serves its own version.

    :param source: the bundle; never written to.
    :returns: the folder of ``AIRFLOW_MLOPS_SERVING_DIR``, or a temporary one, which goes with the container.
    :raises StorageError: the folder can't be written.
    """
    given = os.environ.get(SERVING_DIR_VARIABLE)
    folder = Path(given or tempfile.mkdtemp(prefix="airflow-mlops-serving-"))
    os.environ[SERVING_DIR_VARIABLE] = str(folder)  # workers share it
    data = (source / DESIRED_FILE).read_bytes()
    desired = DesiredState.from_bytes(data)
    for version in desired.versions:
        _copy(source / desired.folder(version), folder / desired.folder(version))
    path = folder / DESIRED_FILE
    if not path.exists() or path.read_bytes() != data:
        write_whole(path, data)
    if not given:
        log.info("serving from %s; set %s to keep the inference log", folder, SERVING_DIR_VARIABLE)
    return folder


def _copy(source: Path, destination: Path) -> None:
    """Copy under a name of one's own and rename: several workers may start at once. What is there already is checked anyway."""
    temporary = destination.parent / f".{destination.name}-{uuid.uuid4().hex}"
    with storage_errors(f"copy the model to {destination}"):
        if destination.exists():
            return
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            for file in source.iterdir():
                shutil.copyfile(file, temporary / file.name)
            try:
                temporary.rename(destination)
            except OSError:
                if not destination.exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
