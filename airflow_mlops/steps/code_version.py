"""Which code trained a model: git commit and whether the tree had changes, where there is a git checkout."""

from __future__ import annotations

import shutil
import subprocess


def code_version() -> dict[str, str]:
    """Give ``git_commit`` and ``git_dirty``; empty where the working directory is no checkout or git is missing."""
    git = shutil.which("git")
    if git is None:
        return {}
    commit = _git(git, "rev-parse", "HEAD")
    if commit is None:
        return {}
    status = _git(git, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_dirty": str(bool(status)).lower()}


def _git(program: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - fixed program and arguments
            [program, *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
