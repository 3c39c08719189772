"""Evidence: runs on the real SkyPilot, on a real Slurm and on an EC2 with machines behind it."""
