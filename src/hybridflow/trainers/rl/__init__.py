"""The reinforcement-learning loop and what it calls."""
