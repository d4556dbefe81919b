"""Publication of weights to the generation engine, verified there."""
