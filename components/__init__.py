"""Pipeline components: each a thin call into `osft`. Importing them needs kfp and nothing else."""

import os

IMAGE = os.environ.get("OSFT_IMAGE", "localhost/osft:0.1.0")
"""The image of every step, written into the compiled YAML: `make compile IMAGE=registry/osft@sha256:…`."""
