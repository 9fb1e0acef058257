"""What is on disk and in memory of a model: reading, building and writing it, its exact weights, its exports."""
