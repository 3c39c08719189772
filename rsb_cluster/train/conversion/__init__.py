"""Weights in the forms that others write and read."""
