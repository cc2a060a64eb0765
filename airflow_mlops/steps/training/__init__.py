"""What the training step is made of: its spec, rows, fit, record and package."""
