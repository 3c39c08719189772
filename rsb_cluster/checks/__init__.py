"""Does it work here: the doctor and the self-tests."""
