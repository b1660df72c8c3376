"""What only observes: one concern a file."""
