"""Checks that the sections of a configuration fit together."""
