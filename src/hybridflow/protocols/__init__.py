"""What rooms promise each other: protocols of engines and graders, and their records."""
