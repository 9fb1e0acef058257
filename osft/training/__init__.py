"""Training: processes, sharding, the loop, the final checkpoint."""

from osft.training.launch import TrainResult, train

__all__ = ["TrainResult", "train"]
