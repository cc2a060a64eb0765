"""Package folders on disk: written whole, read only when every byte is the one that was registered."""

from __future__ import annotations

import os
from pathlib import Path

from airflow_mlops.core.package import MANIFEST_FILE, PackageManifest, file_digest, package_digest
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.serving.files import write_whole


def hash_files(folder: str | Path) -> dict[str, str]:
    """Hash every file of a package folder but the manifest, as :attr:`PackageManifest.files` wants it."""
    return {
        path.name: file_digest(path.read_bytes())
        for path in sorted(Path(folder).iterdir())
        if path.name != MANIFEST_FILE
    }


def write_manifest(folder: str | Path, manifest: PackageManifest) -> str:
    """Write ``package.json``, the last file of a package.

    :returns: the package digest.
    :raises StorageError: when the folder cannot be written.
    """
    data = manifest.to_bytes()
    write_whole(Path(folder) / MANIFEST_FILE, data)
    return package_digest(data)


def read_package(folder: str | Path, expected_digest: str | None = None) -> PackageManifest:
    """Read the manifest after checking that the folder holds exactly what it lists.

    :param folder: package folder.
    :param expected_digest: digest under which the package was registered; ``None`` checks only that the folder
        agrees with itself.
    :raises ArtifactIntegrityError: naming the first file that is missing, changed, unlisted or a link.
    """
    manifest, _ = read_verified(folder, expected_digest)
    return manifest


def read_verified(
    folder: str | Path, expected_digest: str | None = None
) -> tuple[PackageManifest, dict[str, bytes]]:
    """Read a package once and give the very bytes that were checked, so none can be swapped in between."""
    root = Path(folder)
    if not root.is_dir():
        raise ArtifactIntegrityError(f"{root} is not a package: no such folder")
    manifest_bytes = _read_plain(root / MANIFEST_FILE)
    digest = package_digest(manifest_bytes)
    if expected_digest is not None and digest != expected_digest:
        raise ArtifactIntegrityError(
            f"{root / MANIFEST_FILE} has digest {digest}, registered was {expected_digest}: "
            "this is not the package that was registered"
        )
    try:
        manifest = PackageManifest.from_bytes(manifest_bytes)
    except ValueError as err:
        raise ArtifactIntegrityError(f"{root / MANIFEST_FILE} is not a package manifest: {err}") from err
    unlisted = sorted({entry.name for entry in os.scandir(root)} - set(manifest.files) - {MANIFEST_FILE})
    if unlisted:
        raise ArtifactIntegrityError(
            f"{root / unlisted[0]} is not listed in {MANIFEST_FILE}: packages hold no other files"
        )
    contents = {}
    for name, expected in sorted(manifest.files.items()):
        contents[name] = _read_plain(root / name)
        if file_digest(contents[name]) != expected:
            raise ArtifactIntegrityError(
                f"{root / name} was changed after packaging: SHA-256 {file_digest(contents[name])}, manifest says {expected}"
            )
    return manifest, contents


def _read_plain(path: Path) -> bytes:
    """Read a regular file; a link could point anywhere and change later."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError as err:
        raise ArtifactIntegrityError(f"{path} is missing from the package") from err
    except OSError as err:
        raise ArtifactIntegrityError(f"{path} cannot be read as a plain file: {err.strerror}") from err
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read()
        except IsADirectoryError as err:
            raise ArtifactIntegrityError(f"{path} is a folder; a package holds only plain files") from err
