"""MLflow: runs, live metrics, the model registry."""
