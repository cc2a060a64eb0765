"""fsspec: files on any store it knows, by URI."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import StorageError, TransientError

if TYPE_CHECKING:
    from collections.abc import Iterator


def join(uri: str, *parts: str) -> str:
    """Give the URI of something below another.

    >>> join("s3://bucket/bentos/", "fare-3.tar")
    's3://bucket/bentos/fare-3.tar'
    """
    return "/".join([uri.rstrip("/"), *parts])


def read_file(uri: str) -> bytes | None:
    """Read a small file; ``None`` when there is none.

    :raises StorageError: it may not be read, or nothing knows such URIs.
    """
    import fsspec

    with _store_errors("read", uri):
        system, path = fsspec.url_to_fs(uri)
        try:
            data: bytes = system.cat_file(path)
        except FileNotFoundError:
            return None
        return data


def write_file(uri: str, data: bytes) -> None:
    """Write a small file whole.

    :raises StorageError: it may not be written, or nothing knows such URIs.
    """
    import fsspec

    with _store_errors("write", uri):
        system, path = fsspec.url_to_fs(uri)
        system.makedirs(system._parent(path), exist_ok=True)
        if uri == path or uri.startswith(
            "file:"
        ):  # a store shows an object when it is whole, a disk does not
            temporary = f"{path}.{os.getpid()}.tmp"
            system.pipe_file(temporary, data)
            os.replace(temporary, path)
        else:
            system.pipe_file(path, data)


def upload(source: Path, uri: str) -> None:
    """Copy a file, or a folder with all that is in it; what is there already is written again.

    :raises StorageError: it may not be written, or nothing knows such URIs.
    """
    import fsspec

    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    with _store_errors("write", uri):
        system, root = fsspec.url_to_fs(uri)
        for file in files:
            target = "/".join([root, *file.relative_to(source).parts]) if source.is_dir() else root
            system.makedirs(system._parent(target), exist_ok=True)
            system.put_file(str(file), target)


@contextmanager
def _store_errors(doing: str, uri: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as err:
        raise StorageError(
            f"cannot {doing} {uri}: {err}. Give a folder, or the URI of a store whose fsspec package is installed (s3fs, gcsfs, adlfs)"
        ) from err
    except PermissionError as err:
        raise StorageError(f"cannot {doing} {uri}: {err}; give this user write permission there") from err
    except (ConnectionError, TimeoutError) as err:
        raise TransientError(f"cannot {doing} {uri}: {err}") from err
    except OSError as err:
        raise StorageError(f"cannot {doing} {uri}: {err}") from err
