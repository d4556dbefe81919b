"""The commands, below the command line."""
