"""`python -m rsb_cluster` is `rsb-cluster`."""

from rsb_cluster.cli import main

main()
