"""The visible loops, and what puts the rooms together."""
