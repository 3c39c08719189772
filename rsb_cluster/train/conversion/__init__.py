"""Weights in the formats of timm and the Hugging Face Hub."""
