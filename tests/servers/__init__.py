"""Real servers for the tests: a Slurm cluster and an S3 store, on loopback, in one temporary directory each."""
