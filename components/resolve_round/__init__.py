"""The component `resolve_round`."""
