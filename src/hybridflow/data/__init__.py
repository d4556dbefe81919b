"""From rows to prompts and training examples."""
