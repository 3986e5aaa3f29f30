"""Does the answer hang on what it should: answers to diagnosis texts that were changed a little."""

ROBUSTNESS = "robustness.json"
