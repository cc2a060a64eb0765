"""Alembic environment: runs on the connection the ledger hands over, never from a configuration file."""

from __future__ import annotations

from alembic import context

from airflow_mlops.ledger.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="mlops_alembic_version",
    transaction_per_migration=True,  # one may have to leave its own, to build an index while others write
)
with context.begin_transaction():
    context.run_migrations()
