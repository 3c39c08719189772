"""One test per cause of death: what happens to a run, on the real Slurm, the real S3 server and real processes."""
