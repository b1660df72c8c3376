"""What finished models copy and what they can still do: one model, and several against one another."""
