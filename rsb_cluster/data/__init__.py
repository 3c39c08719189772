"""Data sets: shards, their index, how they are made and checked, and the order in which samples are read."""
