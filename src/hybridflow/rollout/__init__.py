"""Generation engines, and the source of finished groups."""
