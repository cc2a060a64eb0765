"""Whether to retrain, and by which rows."""
