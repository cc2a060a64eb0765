-- A database of its own: the ledger and Airflow each keep their migrations in a table called alembic_version.
CREATE DATABASE ledger;
