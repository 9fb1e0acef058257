"""The settings of a run as arguments of `osft train`: what a pod or a process is started with."""

import json
import re

from osft.settings.base import default
from osft.settings.training import TrainConfig

_CREDENTIALS = re.compile(r"://[^/\s]*:[^/\s]*@")


def train_arguments(config: TrainConfig) -> list[str]:
    """`train --set NAME=VALUE …`, with what is not the default.

    Raises ValueError for a URI with credentials, which everyone could read in a manifest.
    """
    arguments = ["train"]
    for name, field in TrainConfig.model_fields.items():
        value = getattr(config, name)
        if not field.is_required() and value == default(field):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        if _CREDENTIALS.search(text):
            raise ValueError(f"{name} holds credentials. Leave them out of the URI and give them by a secret")
        arguments += ["--set", f"{name}={text}"]
    return arguments
