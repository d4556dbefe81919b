"""Whole configurations, one for each kind of run."""
