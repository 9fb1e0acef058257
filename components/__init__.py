"""Pipeline components: each a thin call into `osft`. Importing them needs kfp and nothing else."""

import os

IMAGE = os.environ.get("OSFT_IMAGE", "localhost/osft-steps:0.1.0")
"""The image of the steps that need no GPU, written into the compiled YAML: `make compile IMAGE=registry/…@sha256:…`."""

TRAINING_IMAGE = os.environ.get("OSFT_TRAINING_IMAGE", "localhost/osft-training:0.1.0")
"""The image of the training pods and of the steps that may ask for a GPU: `make compile TRAINING_IMAGE=…`."""
