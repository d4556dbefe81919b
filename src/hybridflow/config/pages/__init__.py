"""Texts about configurations: pages, schemas, explanations, starters."""
