"""Train the recipes of "ResNet strikes back" on other people's clusters."""

__version__ = "0.1.0"
