"""The program of one rank of a cloud run. It reads its task from standard input, as plain JSON."""

import json
import sys

from rsb_cluster.node.task import Task

if __name__ == "__main__":
    Task(**json.load(sys.stdin))()
