"""What the ingest step is made of: sources, cleaning, partitions, retention."""
