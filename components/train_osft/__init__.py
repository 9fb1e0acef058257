"""The component `train_osft`."""
