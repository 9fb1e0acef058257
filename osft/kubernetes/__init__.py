"""Training as a job on a cluster: its settings, its manifest, its life."""
