"""What is done to a finished model: detect, explain, mitigate, evaluate."""
