"""What holds a run together: its folder, stopping, saving, going on."""
