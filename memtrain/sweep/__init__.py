"""A search over settings: what is tried, each trial as a run of its own, and what is given up early."""
