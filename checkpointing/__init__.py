"""checkpointing: checkpoints that are whole or absent, verified on load."""
