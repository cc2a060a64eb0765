"""Create entries and aliases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "mlops_ledger_entries",
        sa.Column("entry_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("key", sa.String(500), nullable=False),
        sa.Column("model_name", sa.String(250)),
        sa.Column("window_start", sa.DateTime),
        sa.Column("window_end", sa.DateTime),
        sa.Column("subject", sa.String(250)),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("actor", sa.String(750), nullable=False),
        sa.Column("recorded_at", sa.DateTime, nullable=False),
        sa.UniqueConstraint("kind", "key", name="mlops_ledger_entries_kind_key"),
    )
    op.create_index(
        "mlops_ledger_entries_window",
        "mlops_ledger_entries",
        ["model_name", "kind", "window_start", "window_end"],
    )
    op.create_table(
        "mlops_aliases",
        sa.Column("model_name", sa.String(250), primary_key=True),
        sa.Column("alias", sa.String(100), primary_key=True),
        sa.Column("model_version", sa.String(50), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("entry_id", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("mlops_aliases")
    op.drop_table("mlops_ledger_entries")
