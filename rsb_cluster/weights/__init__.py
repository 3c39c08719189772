"""Weights as files: finding them, exporting them."""
