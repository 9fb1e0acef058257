"""Training as a PyTorchJob of Kubeflow's training operator: its settings, its manifest, its life."""
