"""What runs on the nodes of a job around training: tasks, ranks, stop signals, interruption notices, exit codes."""
