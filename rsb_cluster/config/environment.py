"""The environment variables that this package reads; a test compares the table in docs/settings.md with them.

Nothing is imported here, as the help of the command line shows them.
"""

PREFIX = "RSB_"

VARIABLES = {
    "RSB_RUNS": "folder or s3:// URL of the runs, as --runs",
    "RSB_DATA": "folder or s3:// URL of the data sets; a set is in RSB_DATA/NAME",
    "RSB_JOB": "where to train, as --job",
    "RSB_ACCOUNT": "Slurm account, as --account",
    "RSB_PARTITION": "Slurm partition, as --partition",
    "RSB_SHARE": "who may read the runs, as --share: private or group",
    "RSB_NOTIFY": "command that is told when a run is over, as job.notify_command",
    "RSB_CLUSTER_PATH": "folders with recipes/ and jobs/ of your own, with ':' between",
    "XDG_CONFIG_HOME": "folder of rsb-cluster/config.toml; default: ~/.config",
    "XDG_CACHE_HOME": "folder of what submit remembers of models; default: ~/.cache",
}
