"""Pure functions: advantages, losses, aggregation."""
