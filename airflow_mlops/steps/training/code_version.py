"""Which code trained a model: the git commits of the Dag file and of the estimator's own folder, and whether something there is not in them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

#: Said where nothing can be found out: no checkout, or no git.
UNKNOWN = "unknown"

#: Folders of installed packages: their code is told by their versions.
_INSTALLED = {"site-packages", "dist-packages"}


def code_version(files: Iterable[Path], dag_code: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give ``git_commit`` and ``git_dirty`` of the checkouts that hold the code of a model.

    :param files: source files of what was found by import path. Those of installed packages do not count: their versions tell.
    :param dag_code: of the Dag file, as :func:`dag_code_version` gave it where the task runs.
    :returns: commits of several checkouts are separated by a comma; ``git_dirty`` is ``true`` when a file in one was changed, or
        a Python file is not in git. Both are ``unknown`` where nothing is in a checkout.
    """
    own = sorted({str(file.resolve().parent) for file in files if not _is_installed(file)})
    found = {_checkout(folder) for folder in own}
    if dag_code and "git_commit" in dag_code:
        found.add((dag_code["git_commit"], dag_code["git_dirty"]))
    states = [dirty for _, dirty in found]
    return {
        "git_commit": ",".join(sorted({commit for commit, _ in found})) or UNKNOWN,
        "git_dirty": next(
            (state for state in ("true", UNKNOWN) if state in states), "false" if states else UNKNOWN
        ),
    }


def dag_code_version(file: Path | None, bundle_version: str | None) -> dict[str, str]:
    """Give ``git_commit`` and ``git_dirty`` of a Dag file's checkout, and ``bundle_version`` as far as they are known.

    :param file: the Dag file; ``None``: not known.
    :param bundle_version: version of the bundle that Airflow took it from; a Git bundle's is a commit.
    """
    commit, dirty = UNKNOWN, UNKNOWN
    if file is not None and not _is_installed(file):
        commit, dirty = _checkout(str(file.resolve().parent))
    if commit == UNKNOWN and bundle_version:
        commit = bundle_version
    known = {"bundle_version": bundle_version} if bundle_version else {}
    return known if commit == UNKNOWN else {"git_commit": commit, "git_dirty": dirty, **known}


def _is_installed(file: Path) -> bool:
    return bool(_INSTALLED & {*file.parts})


def _checkout(folder: str) -> tuple[str, str]:
    """Give commit and state of the checkout a folder is in."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    others = _git(folder, "ls-files", "--others", "--exclude-standard", "--", ":/*.py")
    if commit is None:
        return UNKNOWN, UNKNOWN
    if changed is None or others is None:
        return commit, UNKNOWN
    return commit, str(bool(changed or others)).lower()


def _git(folder: str, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - fixed program and arguments
            [git, "-C", folder, *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
