"""Graders built from a configuration, and models that grade."""
