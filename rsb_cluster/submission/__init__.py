"""From a request to jobs in a queue: plan, check, preview, submit."""
