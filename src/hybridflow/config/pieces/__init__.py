"""The pieces of an algorithm: their needs, tables and presets."""
