"""Losses and task scores, the gate, the report."""
