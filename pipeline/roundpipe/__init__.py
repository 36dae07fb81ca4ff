"""RoundPipe: stages that belong to no device, dealt round-robin to stateless workers (arXiv 2604.27085)."""
