"""Groups of answers, generated and scored."""
