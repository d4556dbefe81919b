"""The ways to start processes."""
