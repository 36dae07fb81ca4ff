"""Models into MoE models, and back to files that everybody reads."""
