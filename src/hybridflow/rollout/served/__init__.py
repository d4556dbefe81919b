"""What engines outside of this process share."""
