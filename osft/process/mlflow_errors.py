"""What MLflow's errors mean to a user; MLflow is not imported to say so."""

import os
import re
from typing import TYPE_CHECKING

from osft.process.errors import ExhaustedError, UnusableError, one_line

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException


class TrackingRefused(PermissionError, ValueError):
    """The tracking server takes no requests with these credentials."""


def explained_mlflow(error: "MlflowException", uri: str = "") -> Exception:
    """What a user can do about an error of MLflow, in one line: ConnectionError if the server does not answer."""
    server = f"the MLflow server {uri}".rstrip()
    status = error.get_http_status_code()
    text = one_line(error)
    if status in (401, 403):
        user = os.environ.get("MLFLOW_TRACKING_USERNAME")
        return TrackingRefused(
            f"{uri or server} does not take the credentials of {f'the user {user}' if user else 'this process'}. Set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if "disk is full" in text or "disk I/O error" in text:
        return ExhaustedError(f"MLflow's database: {_shortened(text)}. Free space, or move it")
    if "readonly database" in text:
        return UnusableError("MLflow's database cannot be written to. Change its permissions, or give another address")
    if text.startswith("API request to"):
        answered = re.search(r"error code (\d+)", text)
        code = int(answered[1]) if answered else status
        if "not in a valid JSON format" in text or code == 501 or (code < 500 and code not in (408, 425, 429)):
            return UnusableError(f"{server} does not answer as one: {_shortened(text)}. Check the address")
        reason = re.search(r"(?<=\] )[^\"')\]]+(?=[\"')])|error code \d+|\d+ error responses|timed out", text)
        said = f" ({reason[0].lower()})" if reason else ""
        return ConnectionError(f"{server} does not answer{said}. Start it, or check the address and the network")
    if status in (429, 502, 503, 504):
        return ConnectionError(f"{server} fails: {_shortened(text)}. Try again")
    return UnusableError(f"MLflow refuses: {_shortened(text)}")


def _shortened(text: str) -> str:
    """The first sentences of a message, without the SQL that MLflow appends."""
    return re.split(r" \[SQL: | \(Background on this error", text)[0][:400].rstrip(". ")
