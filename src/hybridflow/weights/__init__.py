"""Transport of weights from the trainer to the generation engine."""
