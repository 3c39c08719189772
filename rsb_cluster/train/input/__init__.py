"""From shards to batches of decoded images."""
