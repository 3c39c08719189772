"""Results: tables, reports, and the published values that runs are compared with."""
