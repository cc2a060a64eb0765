"""Which code trained a model: the git commit of the estimator's own folder, and whether something there is not in it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

#: Said where nothing can be found out: no checkout, or no git.
UNKNOWN = "unknown"

#: Folders of installed packages: their code is told by their versions.
_INSTALLED = {"site-packages", "dist-packages"}


def code_version(files: Iterable[Path]) -> dict[str, str]:
    """Give ``git_commit`` and ``git_dirty`` of the checkouts that hold the code of a model.

    :param files: source files of what was found by import path. Those of installed packages do not count; when there are no
        others, the working directory is asked.
    :returns: commits of several checkouts are separated by a comma; ``git_dirty`` is ``true`` when a file in one was changed, or
        a Python file is not in git.
    """
    own = sorted({str(file.resolve().parent) for file in files if not _INSTALLED & {*file.parts}})
    found = sorted({_checkout(folder) for folder in own or [str(Path.cwd())]})
    states = [dirty for _, dirty in found]
    return {
        "git_commit": ",".join(dict.fromkeys(commit for commit, _ in found)),
        "git_dirty": next((state for state in ("true", UNKNOWN) if state in states), "false"),
    }


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
