"""Index what entries are about: the history of a table or a version is asked for by its name."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NAME, TABLE = "mlops_ledger_entries_subject", "mlops_ledger_entries"
#: The last one gives the newest first without sorting.
COLUMNS = ["subject", "kind", "entry_id"]


def upgrade() -> None:
    context = op.get_context()
    if context.dialect.name != "postgresql":
        op.create_index(NAME, TABLE, COLUMNS)  # SQLite: readers go on, writers wait
        return
    # Concurrently, so that others write meanwhile, and so in no transaction: what was killed leaves an index that is not used.
    with context.autocommit_block():
        op.drop_index(NAME, TABLE, if_exists=True, postgresql_concurrently=True)
        op.create_index(NAME, TABLE, COLUMNS, postgresql_concurrently=True)


def downgrade() -> None:
    op.drop_index(NAME, TABLE)
