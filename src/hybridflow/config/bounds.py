"""Bounds of numbers."""

# A reward is learned from in float32: squares of numbers up to this size are finite there, and sums of 10^14 of them.
LARGEST_REWARD = 1e12
