"""The training loops, and the code that assembles a run."""
