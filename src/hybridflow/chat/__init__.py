"""Chat templates, and special tokens in what they make."""
