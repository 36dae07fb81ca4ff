"""launch: the four packages together in one fine-tuning job under torchrun."""
