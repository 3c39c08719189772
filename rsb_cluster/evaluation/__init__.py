"""Evaluates weights on data sets: requests, processes and records."""
