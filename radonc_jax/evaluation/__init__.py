"""From prompts and a decoder to scores, tests and the report. No jax in here."""
