"""Slurm: the back end, its programs, the job script, and what the queue says of jobs."""
