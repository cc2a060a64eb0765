"""Where a Bento starts: its model is unpacked before the service looks for it."""

from __future__ import annotations

from pathlib import Path

from airflow_mlops.serving.bundled import BUNDLE_FOLDER, unpack

unpack(Path(__file__).parents[2] / BUNDLE_FOLDER)

from airflow_mlops.serving.service import ModelEndpoint  # noqa: E402 - it reads the folder's name when it is imported

__all__ = ["ModelEndpoint"]
