"""The component `prepare_data`."""
