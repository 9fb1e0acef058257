"""What a process requests after a training step: the ranks agree on the largest of their requests.

Whoever follows the run requests by a file (`osft.training.mirror.STOP_FILE`), which holds the number.
"""

from enum import IntEnum


class Request(IntEnum):
    """Ordered by weight."""

    NOTHING = 0
    SAVE_STATE = 1
    INTERRUPT = 2
    """Save the state and end; the same call resumes."""
    STOP = 3
    """End training, with a model."""
