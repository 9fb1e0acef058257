"""Pipelines: components put together and compiled to YAML."""
