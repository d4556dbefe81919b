"""Typed configuration, importable without torch."""
