"""Pipeline schedules as data, and stages that belong to no device (RoundPipe, arXiv 2604.27085)."""
