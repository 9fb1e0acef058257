"""What `osft train` ends with: a scheduler decides by it whether to restart the process.

Kubeflow's training operator (restartPolicy ExitCode) takes 1 to 127 for a program error, which fails the job, and 128
and more for something that another attempt may not meet: that one resumes from the saved state.
"""

import signal

FIRST_RETRYABLE = 128

FAILED = 1
"""A training process raised an exception."""

REFUSED = 2
"""A parameter, the data or the model cannot be used; nothing was started."""

ABANDONED = 75
"""Nobody has followed the run on its cluster for too long; its state is saved (`osft.training.lease`)."""

CONNECTION_LOST = 128 + signal.SIGPIPE
"""The connection to another process, node or object store broke; if a peer died, its own end tells why."""

INTERRUPTED = 128 + signal.SIGTERM
"""The run was asked to end; its state is saved. A process that a signal killed ends with 128 + its number alike."""

KEYBOARD_INTERRUPT = 128 + signal.SIGINT
"""Ctrl-C: a command that only watched; what it watched continues."""
