"""Tests against the real servers of ``tests.servers``."""
