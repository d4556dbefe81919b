"""The `hybridflow` command."""
