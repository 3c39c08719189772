"""From a request to jobs in a queue: planning, checking, showing, handing over."""
