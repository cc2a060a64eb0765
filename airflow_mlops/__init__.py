"""Closed model loop on Apache Airflow: ingest, validate, train, roll out, watch and retrain."""

from __future__ import annotations

__version__ = "0.1.0"
