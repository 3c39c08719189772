"""Finds and exports weights."""
