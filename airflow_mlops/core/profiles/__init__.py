"""Partitions summed up: profiles that merge exactly and stand for the rows they were made of."""
