"""Models that act: episodes, tools, environments, and where they run."""
