"""Known data sets to rows of one schema: `hybridflow prepare`. One small module each; the table is in `sets.py`."""
