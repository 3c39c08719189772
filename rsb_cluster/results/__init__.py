"""What came out: tables, reports, and the published numbers that they are compared with."""
