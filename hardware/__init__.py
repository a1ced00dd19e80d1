"""What a chip can do: the integer network, its semantics, targets, runtimes and the formats they read."""
