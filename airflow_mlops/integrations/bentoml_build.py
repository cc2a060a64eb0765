"""BentoML: a folder of sources becomes a Bento, with the Dockerfile BentoML makes for it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_mlops.core.environment import bare_environment
from airflow_mlops.core.names import distinct

#: When every Bento was made, so that equal ones are equal; the ledger knows when it really was.
_NO_TIME = "1980-01-01T00:00:00+00:00"

_BENTO_FILE, _BUILD_FILE = "bento.yaml", "bentofile.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bento:
    """A Bento that was built.

    :param tag: ``name:version``.
    :param digest: of all its files; the same for the same sources.
    :param folder: also a container's build context; the Dockerfile is ``env/docker/Dockerfile``.
    """

    tag: str
    digest: str
    folder: Path


@contextmanager
def built_bento(
    context: Path,
    *,
    service: str,
    name: str,
    version: str,
    requirements: Sequence[str],
    base_image: str | None,
    serving_dir: Path,
) -> Iterator[Bento]:
    """Build a Bento in a process of its own, which imports the service from the sources.

    :param context: the sources; ``bentofile.yaml`` is written there.
    :param service: ``module:Class`` in the sources.
    :param name: of the Bento.
    :param version: of the Bento.
    :param requirements: lines for pip: all that the image needs, with versions. Nothing is looked up.
    :param base_image: of the container; ``None``: BentoML's choice.
    :param serving_dir: folder that the service may write to while it is imported.
    :returns: the Bento, which is gone afterwards.
    :raises RuntimeError: BentoML did not build it; with its output.
    """
    build: dict[str, Any] = {
        "service": service,
        "name": name,
        "description": f"A model version and what serves it: {name} {version}.",
        "envs": [{"name": "BENTOML_DO_NOT_TRACK", "value": "True"}],
        "python": {"packages": list(requirements), "lock_packages": False},
    }
    if base_image:
        build["docker"] = {"base_image": base_image}
    # JSON is YAML.
    (context / _BUILD_FILE).write_text(json.dumps(build, indent=2))
    with tempfile.TemporaryDirectory(prefix="bento-") as home:
        environment = bare_environment() | {
            "BENTOML_HOME": home,
            "BENTOML_DO_NOT_TRACK": "True",
            "PYTHONDONTWRITEBYTECODE": "1",
            "AIRFLOW_MLOPS_SERVING_DIR": str(serving_dir),
        }
        environment.pop(
            "PYTHONPATH", None
        )  # what is not in the sources must be missed here, not in the image
        command = [sys.executable, "-m", "bentoml", "build", str(context), "--version", version]
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [*command, "--output", "tag"],
            env=environment,
            cwd=context,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        folder = Path(home) / "bentos" / name / version
        if done.returncode != 0 or not (folder / _BENTO_FILE).is_file():
            raise RuntimeError(
                f"BentoML did not build {name}:{version} (exit code {done.returncode}):\n{(done.stdout + done.stderr)[-4000:]}"
            )
        path = folder / _BENTO_FILE
        path.write_text(re.sub(r"(?m)^creation_time: .*$", f"creation_time: '{_NO_TIME}'", path.read_text()))
        yield Bento(tag=f"{name}:{version}", digest=digest_of(folder), folder=folder)


def bento_name(model_name: str) -> str:
    """Give the name a model's Bentos have: BentoML takes lower case, digits and ``_-.`` only.

    Two models never have the same.

    >>> bento_name("trip_fare"), bento_name("Trip Fare (NYC)")
    ('trip_fare', 'trip-fare-nyc-7b2f2f')
    """
    plain = re.sub(r"[^a-z0-9_.-]+", "-", model_name.lower()).strip("-_.")
    return distinct(plain or "model", model_name)


def digest_of(folder: Path) -> str:
    """Give the digest of a folder: of the names and contents of its files; stores keep no modes."""
    whole = hashlib.sha256()
    for path in files_of(folder):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        whole.update(f"{content} {path.relative_to(folder).as_posix()}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def pack(folder: Path, archive: Path) -> None:
    """Write a folder as a tar file that is the same whoever writes it, and whenever."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.name.endswith(".sh") else 0o644
        return member

    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in files_of(folder):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False, filter=plain)


def copy_sources(root: Path, files: Sequence[str], destination: Path) -> None:
    """Copy files, with the folders they are in."""
    for name in files:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)


def files_of(folder: Path) -> list[Path]:
    """List the files of a folder, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
