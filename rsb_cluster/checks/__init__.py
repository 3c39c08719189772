"""Checks on the user's own cluster: ``doctor`` and ``selftest``."""
