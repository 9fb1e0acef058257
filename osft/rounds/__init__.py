"""Rounds of continual learning: what is new, and what it is learned on top of."""
