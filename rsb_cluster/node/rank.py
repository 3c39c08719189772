"""One rank of a cloud run, as its node starts it. The task comes by standard input as plain JSON."""

import json
import sys

from rsb_cluster.node.task import Task

if __name__ == "__main__":
    Task(**json.load(sys.stdin))()
