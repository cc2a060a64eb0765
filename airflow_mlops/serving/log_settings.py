"""What the inference log keeps, and where: one file in its folder, or the environment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import from_dict
from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.serving.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: Of the serving folder; holds the log, or what is not uploaded yet.
LOG_FOLDER = "inference_log"
SETTINGS_FILE = "settings.json"
VARIABLE_PREFIX = "AIRFLOW_MLOPS_LOG_"
#: Holds the key of pseudonyms; a secret, so it is in no file of ours.
KEY_VARIABLE = f"{VARIABLE_PREFIX}KEY"

_SHORTEST_KEY = 16
#: Given in the environment with commas between.
_LISTS = frozenset({"drop", "pseudonymize"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSettings:
    """How predictions are logged.

    :param uri: where files are kept, any that fsspec knows; ``None``: in the log's own folder. With one, that folder holds what is
        not uploaded yet.
    :param share: of the predictions to log, in ``(0, 1]``; which ones depends on their ids alone.
    :param drop: inputs that are not logged.
    :param pseudonymize: text inputs of which a keyed digest (HMAC-SHA-256) is logged; a number can't be one and is dropped.
    :param flush_seconds: how often rows are written; a crash loses those of one interval.
    :param maximum_rows: rows held in memory at most.
    :param maximum_megabytes: of these rows, at most, by a plain estimate; long texts take much.
    :param spool_megabytes: of files that wait for their upload, at most.
    :param retention_days: after which an hour's files are deleted; ``None``: never.
    """

    uri: str | None = None
    share: float = 1.0
    drop: tuple[str, ...] = ()
    pseudonymize: tuple[str, ...] = ()
    flush_seconds: float = 1.0
    maximum_rows: int = 200_000
    maximum_megabytes: int = 512
    spool_megabytes: int = 1024
    retention_days: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share: {self.share} is not in (0, 1]")
        for name in (
            "flush_seconds",
            "maximum_rows",
            "maximum_megabytes",
            "spool_megabytes",
            "retention_days",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value} is not above 0")

    @classmethod
    def load(cls, folder: Path, environ: Mapping[str, str] | None = None) -> LogSettings:
        """Read ``settings.json`` of the log's folder; it goes before variables such as ``AIRFLOW_MLOPS_LOG_SHARE``.

        The variables of a worker are those of every service it starts, and the file is this one's own.

        :raises ConnectionConfigError: a setting is unknown or does not fit; names it and where it is from.
        """
        path = folder / SETTINGS_FILE
        given = _read(path)
        source = os.environ if environ is None else environ
        known = [field.name for field in fields(cls)]
        # A mistyped "drop" must not end in personal data on disk.
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConnectionConfigError(
                f"the log's settings {path} name {', '.join(unknown)}; known are {', '.join(known)}"
            )
        from_variables = {
            name: _listed(name, text)
            for name in known
            if (text := source.get(VARIABLE_PREFIX + name.upper(), ""))
        }
        try:
            return from_dict(cls, from_variables | given)
        except ValueError as err:
            raise ConnectionConfigError(
                f"the log's settings do not fit ({path} and variables {VARIABLE_PREFIX}...): {err}"
            ) from err

    def key(self, environ: Mapping[str, str] | None = None) -> bytes:
        """Give the key of pseudonyms; empty where none are asked for.

        :raises ConnectionConfigError: it is missing or short, and something is to be pseudonymized.
        """
        if not self.pseudonymize:
            return b""
        key = (os.environ if environ is None else environ).get(KEY_VARIABLE, "").encode()
        if len(key) < _SHORTEST_KEY:
            raise ConnectionConfigError(
                f"{', '.join(self.pseudonymize)} can't be pseudonymized: export {KEY_VARIABLE} with a secret of at least "
                f"{_SHORTEST_KEY} characters to the service, or drop the columns"
            )
        return key

    def key_of_callers(self, environ: Mapping[str, str] | None = None) -> bytes | None:
        """Give the key of callers' pseudonyms: that of all others; ``None`` where there is none, or a short one."""
        key = (os.environ if environ is None else environ).get(KEY_VARIABLE, "").encode()
        return key if len(key) >= _SHORTEST_KEY else None


def keep_in_folder(folder: Path) -> None:
    """Let a log stay in its own folder, wherever the variables would have it.

    :raises ConnectionConfigError: its settings can't be read.
    :raises StorageError: or can't be written.
    """
    path = folder / SETTINGS_FILE
    given = _read(path)
    if given.get("uri", "") is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**given, "uri": None}, indent=2).encode())


def read_settings(folder: Path) -> bytes | None:
    """Give a log's file of settings as it is; ``None``: there is none."""
    path = folder / SETTINGS_FILE
    return path.read_bytes() if path.is_file() else None


def write_settings(folder: Path, settings: bytes | None) -> None:
    """Let a log's file of settings be as it was."""
    path = folder / SETTINGS_FILE
    if settings is None:
        path.unlink(missing_ok=True)
    elif read_settings(folder) != settings:
        write_whole(path, settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_bytes())
        if not isinstance(given, dict):
            raise ValueError("an object is needed")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as err:
        raise ConnectionConfigError(f"the log's settings {path} can't be read: {err}") from err
    return given


def _listed(name: str, text: str) -> Any:
    return [item.strip() for item in text.split(",") if item.strip()] if name in _LISTS else text
