"""What it learns from: jsonl records, the datasets of every stage, and the built-in world."""
