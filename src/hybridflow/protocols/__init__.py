"""The protocols between rooms: engines and graders, and their records."""
