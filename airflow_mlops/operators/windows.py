"""The window arguments of operators that also work without one, on a whole table."""

from __future__ import annotations

#: Start and end of the run's data interval: what the window arguments say when nobody gave them.
RUN_WINDOW = ("{{ data_interval_start }}", "{{ data_interval_end }}")
