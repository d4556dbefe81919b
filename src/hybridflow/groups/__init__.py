"""Groups of responses, generated and scored."""
