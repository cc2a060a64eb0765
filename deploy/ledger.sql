-- A database of its own: the ledger outlives a reset of Airflow's metadata and is backed up by itself.
CREATE DATABASE ledger;
