"""From prompts to greedy answers."""
