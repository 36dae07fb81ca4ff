"""chunkflow: uniform chunks of long-tailed sequences, trained with exact gradients."""
