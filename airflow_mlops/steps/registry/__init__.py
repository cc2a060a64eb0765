"""Registered models as the steps find them: aliases, packages, predecessors, provenance."""
