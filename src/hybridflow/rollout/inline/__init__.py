"""Generation on the training process's own model."""
