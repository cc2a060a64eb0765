"""What is asked of data before a model may learn from it: expectations, skew, poisoning."""
