"""Data before anyone judged it: what a dataset version is, its digest, partitions, schema, cleaning."""
