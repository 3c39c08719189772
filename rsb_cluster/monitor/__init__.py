"""Monitoring submitted runs: status and logs; and the actions on them: cancel, preempt, retry."""
