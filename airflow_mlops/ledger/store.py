"""The ledger: append-only entries that are written once, and alias pointers that move by compare-and-set."""

from __future__ import annotations

from airflow_mlops.ledger.grades import Grades
from airflow_mlops.ledger.retrainings import Retrainings


class Ledger(Grades, Retrainings):
    """A connection to the ledger; use :meth:`open`, and it as a context manager.

    Entries, aliases, windows and retrainings are each in a file of their own.

    :param engine: engine of a database whose schema is up to date.
    """
