"""From a raw extract to a cohort folder and its batches. Nothing in here imports jax."""
