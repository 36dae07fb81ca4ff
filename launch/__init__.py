"""launch: the packages together in one fine-tuning job under torchrun."""

from launch.state import TrainState

__all__ = ["TrainState"]
