"""Which sections of a configuration go together."""
