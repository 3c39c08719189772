"""Scoring weights on a split."""
