"""One round of continual learning."""
