"""The trained state: its step, its optimiser, its checkpoints."""
