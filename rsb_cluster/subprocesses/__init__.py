"""Python processes that this package starts: by which command, and how they answer."""
