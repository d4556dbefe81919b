"""Where metrics and rollouts go."""
