"""The built-in rewards, which compare an answer with the ground truth."""
