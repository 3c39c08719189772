"""Data sets: writing, indexing and verifying shards, and reading samples in a reproducible order."""
