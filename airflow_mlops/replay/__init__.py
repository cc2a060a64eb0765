"""Replay: what a policy would have done on a stream of the past, through the steps that the Dags run."""

from __future__ import annotations
