"""Ports for servers of tests."""

from __future__ import annotations

from airflow_mlops.demo.processes import free_ports


def free_port() -> int:
    """Find one that nobody listens on, and that no connection is given while the server starts: the system gives out higher ones."""
    return free_ports(1)[0]
