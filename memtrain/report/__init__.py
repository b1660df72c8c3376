"""Pictures from what a run wrote."""
