"""The component `precompute_svd`."""
