"""Taking pictures out of a finished model again that it has memorized."""
