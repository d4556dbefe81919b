"""The sections of configurations: data alone."""
