"""Weights given to the generation engine, and verified there."""
