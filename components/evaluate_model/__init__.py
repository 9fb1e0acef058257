"""The component `evaluate_model`."""
