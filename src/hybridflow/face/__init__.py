"""The call `hybridflow.train`: a run whose model, rows, reward and callbacks are given as objects."""
