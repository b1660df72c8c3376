"""Which prompts has a finished model memorized? Scores of prompts, and how well they separate."""
