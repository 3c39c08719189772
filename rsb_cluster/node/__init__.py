"""What runs on the nodes of a cloud run, and the spec that tells them what to do."""
