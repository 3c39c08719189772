"""The threads of this process."""

import threading


def threads_named(*beginnings: str) -> list[str]:
    """Return the names of the threads that are called so."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith(beginnings))
