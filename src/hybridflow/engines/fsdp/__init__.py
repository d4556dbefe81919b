"""Models that are cut over processes."""
