"""What every kind of run shares: its folder, stopping, saving, resuming."""
