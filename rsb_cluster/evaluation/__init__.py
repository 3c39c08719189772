"""Evaluating weights on data sets: what is asked for, started and kept."""
