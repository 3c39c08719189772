"""Clouds: each run is a managed job of SkyPilot, which provisions machines and replaces them after a preemption."""
