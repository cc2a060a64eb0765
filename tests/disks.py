"""Folders that refuse, for real."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Deny writing to a folder even to root, who is above permissions."""
    chattr = shutil.which("chattr")
    if chattr is None or subprocess.run([chattr, "+i", str(path)], capture_output=True).returncode != 0:
        pytest.skip("denying a folder needs chattr, the right to use it, and a file system that knows it")
    try:
        yield
    finally:
        subprocess.run([chattr, "-i", str(path)], check=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Put a disk of 400 kB in a folder's place."""
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small disk to fill needs the right to mount one")
    try:
        yield
    finally:
        subprocess.run([str(shutil.which("umount")), str(folder)], check=True)
