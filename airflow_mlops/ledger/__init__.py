"""The durable record of what was seen and decided."""

from __future__ import annotations

from airflow_mlops.ledger.challengers import wanted_challengers
from airflow_mlops.ledger.entries import ACTING, ChampionPeriod, EntryKind, LedgerEntry, Recorded, WindowGrade
from airflow_mlops.ledger.store import Ledger

__all__ = [
    "ACTING",
    "ChampionPeriod",
    "EntryKind",
    "Ledger",
    "LedgerEntry",
    "Recorded",
    "WindowGrade",
    "wanted_challengers",
]
