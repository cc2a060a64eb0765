"""What can go wrong in the demo, told so that a reader knows where to look."""

from __future__ import annotations

from airflow_mlops.exceptions import MLOpsError


class DemoError(MLOpsError):
    """The demo cannot go on; the message says why and what to do."""


class ProcessFailedError(DemoError):
    """A program the demo started ended or did not come up; the message holds the end of its log."""


class RunFailedError(DemoError):
    """A Dag run failed; the message names the task and holds the end of its log."""
