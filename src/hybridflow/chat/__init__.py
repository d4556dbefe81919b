"""Chat templates, and special tokens in their text."""
