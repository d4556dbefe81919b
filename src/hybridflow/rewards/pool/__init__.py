"""Reward functions in processes with limits."""
