"""What a process may wish after a training step, in the order of their weight.

The largest of all ranks' wishes is done. Whoever follows the run wishes by a file (`osft.training.mirror.STOP_FILE`).
"""

GO_ON, SAVE_STATE, INTERRUPT, STOP = range(4)
"""INTERRUPT: save the state and end. STOP: end training, with a model."""
