"""What is written about configurations: pages, schemas, explanations, starters."""
