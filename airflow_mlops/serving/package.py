"""Package folders on disk: written whole, read only when every byte is the one that was registered."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from airflow_mlops.core.model.package import (
    MANIFEST_FILE,
    MAXIMUM_MANIFEST_BYTES,
    MAXIMUM_PACKAGE_BYTES,
    PackageManifest,
    file_digest,
    package_digest,
)
from airflow_mlops.core.model.signing import SIGNATURE_FILE, PackageSignature
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.serving.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlops.core.model.signing import Trust


# Hashed at once.
_PIECE_BYTES = 1 << 20


def hash_files(folder: str | Path) -> dict[str, str]:
    """Hash every file of a package folder but manifest and signature, as :attr:`PackageManifest.files` wants it."""
    return {
        path.name: file_digest(path.read_bytes())
        for path in sorted(Path(folder).iterdir())
        if path.name not in {MANIFEST_FILE, SIGNATURE_FILE}
    }


def write_manifest(folder: str | Path, manifest: PackageManifest) -> str:
    """Write ``package.json``, the last file of a package.

    :returns: the package digest.
    :raises StorageError: when the folder cannot be written.
    """
    data = manifest.to_bytes()
    write_whole(Path(folder) / MANIFEST_FILE, data)
    return package_digest(data)


def write_signature(folder: str | Path, signature: PackageSignature) -> None:
    """Write ``package.sig`` beside the manifest.

    :raises StorageError: when the folder cannot be written.
    """
    write_whole(Path(folder) / SIGNATURE_FILE, signature.to_text().encode())


def read_package(
    folder: str | Path, expected_digest: str | None = None, *, trust: Trust | None = None
) -> PackageManifest:
    """Read the manifest after checking that the folder holds exactly what it lists.

    :param folder: package folder.
    :param expected_digest: digest under which the package was registered; ``None`` checks only that the folder
        agrees with itself.
    :param trust: whose signature it must carry; ``None`` asks for none.
    :raises ArtifactIntegrityError: naming the first file that is missing, changed, unlisted, too large or a link, or
        saying what is wrong with the signature.
    """
    manifest = _read_manifest(Path(folder), expected_digest, trust)
    room = MAXIMUM_PACKAGE_BYTES
    for name, expected in sorted(manifest.files.items()):
        # In pieces: a large model isn't taken into memory for nothing.
        found, size = _hash_plain(Path(folder) / name, room)
        room -= size
        _require_same(Path(folder) / name, found, expected)
    return manifest


def read_verified(
    folder: str | Path, expected_digest: str | None = None, *, trust: Trust | None = None
) -> tuple[PackageManifest, dict[str, bytes]]:
    """Read a package once and give the very bytes that were checked, so none can be swapped in between."""
    root = Path(folder)
    manifest = _read_manifest(root, expected_digest, trust)
    contents: dict[str, bytes] = {}
    room = MAXIMUM_PACKAGE_BYTES
    for name, expected in sorted(manifest.files.items()):
        contents[name] = _read_plain(root / name, room)
        room -= len(contents[name])
        _require_same(root / name, file_digest(contents[name]), expected)
    return manifest, contents


def _read_manifest(root: Path, expected_digest: str | None, trust: Trust | None) -> PackageManifest:
    """Read the manifest of a folder in which there is no file that it doesn't list."""
    if not root.is_dir():
        raise ArtifactIntegrityError(f"{root} is not a package: no such folder")
    manifest_bytes = _read_plain(root / MANIFEST_FILE, MAXIMUM_MANIFEST_BYTES)
    digest = package_digest(manifest_bytes)
    if expected_digest is not None and digest != expected_digest:
        raise ArtifactIntegrityError(
            f"{root / MANIFEST_FILE} has digest {digest}, registered was {expected_digest}: "
            "this is not the package that was registered"
        )
    if trust is not None:  # before a byte of it is parsed
        trust.require(read_signature(root), package_digest=digest, where=str(root))
    try:
        manifest = PackageManifest.from_bytes(manifest_bytes)
    except (ValueError, RecursionError) as err:
        raise ArtifactIntegrityError(f"{root / MANIFEST_FILE} is not a package manifest: {err}") from err
    known = {*manifest.files, MANIFEST_FILE, SIGNATURE_FILE}
    unlisted = sorted({entry.name for entry in os.scandir(root)} - known)
    if unlisted:
        raise ArtifactIntegrityError(
            f"{root / unlisted[0]} is not listed in {MANIFEST_FILE}: packages hold no other files"
        )
    return manifest


def read_signature(folder: str | Path) -> PackageSignature | None:
    """Read ``package.sig``; ``None`` when there is none.

    :raises ArtifactIntegrityError: the file is no signature.
    """
    path = Path(folder) / SIGNATURE_FILE
    if not os.path.lexists(path):
        return None
    try:
        return PackageSignature.from_text(_read_plain(path, MAXIMUM_MANIFEST_BYTES).decode())
    except ValueError as err:
        raise ArtifactIntegrityError(f"{path} is not a package signature: {err}") from err


def _require_same(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactIntegrityError(
            f"{path} was changed after packaging: SHA-256 {found}, manifest says {expected}"
        )


def _read_plain(path: Path, maximum_bytes: int) -> bytes:
    """Read a file whole."""
    with _open_plain(path, maximum_bytes) as (file, size):
        return file.read(size)


def _hash_plain(path: Path, maximum_bytes: int) -> tuple[str, int]:
    """Give the SHA-256 of a file, and its size."""
    digest = hashlib.sha256()
    with _open_plain(path, maximum_bytes) as (file, size):
        left = size
        while left and (piece := file.read(min(left, _PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest(), size


@contextmanager
def _open_plain(path: Path, maximum_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file; a link could point anywhere and change later, a pipe would never end.

    :returns: the file and its size now. Nobody reads on, should it grow meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as err:
        raise ArtifactIntegrityError(f"{path} is missing from the package") from err
    except OSError as err:
        raise ArtifactIntegrityError(f"{path} cannot be read as a plain file: {err.strerror}") from err
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactIntegrityError(f"{path} is not a plain file; a package holds nothing else")
        if status.st_size > maximum_bytes:
            raise ArtifactIntegrityError(
                f"{path} makes the package larger than {MAXIMUM_PACKAGE_BYTES} bytes "
                f"(the manifest: {MAXIMUM_MANIFEST_BYTES}); it was not loaded"
            )
        yield file, status.st_size
