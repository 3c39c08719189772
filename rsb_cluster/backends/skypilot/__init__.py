"""Machines of any cloud: each run is a managed job of SkyPilot's, which gets machines, and new ones when they go."""
