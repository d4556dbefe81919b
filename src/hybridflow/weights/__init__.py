"""Weights on their way from trainer to generation engine."""
