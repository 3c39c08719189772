"""Looking after runs that were submitted: status, logs, and ending or sending them again."""
