"""Whether MLflow can be reached with the credentials that are here, and which release it is."""

import base64
import importlib.metadata
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from osft import storage
from osft.doctor.finding import Finding, NotChecked, error, ok, separated, warning
from osft.doctor.subject import Subject
from osft.doctor.versions import version_of
from osft.tracking.addresses import checked_address

OLDEST = (2, 9)
"""The first whose registry has aliases and tags as the champion needs them."""
_SECONDS = 10.0
_SERVER = "Set mlflow_tracking_uri (or MLFLOW_TRACKING_URI) to the address of an MLflow server"


def check_mlflow(subject: Subject) -> Iterator[Finding]:
    """Is the address one, does MLflow answer there and take the credentials, and does its release go with ours?"""
    configuration = subject.configuration
    given = configuration.text("mlflow_tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI", "")
    root = configuration.storage_root
    if not given:
        yield _database(subject, root)
        return
    try:
        address = checked_address(given, make=False)
    except ValueError as reason:
        yield error("MLflow", *separated(reason))
        return
    about = f"MLflow {address}"
    if not address.startswith(("http:", "https:")):
        yield _given_database(subject, about, address)
        return
    host = urlsplit(address).hostname or ""
    if not subject.in_pod and host.endswith((".svc", ".cluster.local")):
        raise NotChecked(f"{address} is an address inside the cluster: run osft doctor in a pod, or forward its port")
    try:
        release = _release(address)
    except (OSError, ValueError) as failure:
        if not subject.in_pod and isinstance(getattr(failure, "reason", None), socket.gaierror):
            raise NotChecked(f"{host} is no name here; if it is one of the cluster, run osft doctor in a pod") from None
        remedy = "Start the server, or correct mlflow_tracking_uri (MLFLOW_TRACKING_URI)"
        yield error(about, f"does not answer: {failure}", remedy)
        return
    yield _compared(about, release)
    yield _access(about, address, root)


def _database(subject: Subject, root: str) -> Finding:
    """Of rounds for which no address is given."""
    if storage.is_remote(root):
        return error("MLflow", f"no address is given, and {root} can hold no database", _SERVER)
    if subject.in_pod:
        return error("MLflow", f"no address is given: a step refuses a SQLite database below {root}", _SERVER)
    if subject.has_cluster:
        text = "no address is given: a step in a pod without MLFLOW_TRACKING_URI refuses to begin"
        return warning("MLflow", text, _SERVER)
    return ok("MLflow", f"no address is given: a SQLite database below {root}")


def _given_database(subject: Subject, about: str, address: str) -> Finding:
    if address.startswith("sqlite:") and subject.has_cluster:
        return warning(about, "is a file, which pods of several nodes would damage", _SERVER)
    return ok(about, "is a database, which is opened when a round begins")


def _release(address: str) -> str:
    """What the server says of itself. Raises OSError where it does not answer."""
    request = urllib.request.Request(f"{address.rstrip('/')}/version")
    user, token = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user:
        login = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}".encode()
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
    elif token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return str(answer.read(200).decode("utf-8", "replace")).strip()
    except urllib.error.HTTPError:
        return ""  # an old one without that path, or one that refuses who asks


def _compared(about: str, release: str) -> Finding:
    try:
        ours_text = importlib.metadata.version("mlflow")
    except importlib.metadata.PackageNotFoundError:
        raise NotChecked("needs the extra: pip install 'osft[mlflow]'") from None
    server, ours = version_of(release), version_of(ours_text)
    if server is None or ours is None:
        return ok(about, f"answers, and does not tell its release; the client here is {ours_text}")
    if server < OLDEST:
        remedy = f"Upgrade the server to {ours[0]}.{ours[1]}: its registry has no aliases as the champion needs them"
        return error(about, f"is release {release}, the client here {ours_text}", remedy)
    if server[0] != ours[0]:
        remedy = f"Upgrade the {'server' if server < ours else 'client'} to {max(server, ours)[0]}.x"
        return warning(about, f"is release {release}, the client here {ours_text}", remedy)
    return ok(about, f"is release {release}, the client here {ours_text}")


def _access(about: str, address: str, root: str) -> Finding:
    from osft.tracking import runs

    try:
        runs.client(address, root, wait_seconds=0.0)
    except (ValueError, ConnectionError, PermissionError) as refusal:
        return error(about, *separated(refusal))
    return ok(about, "takes the credentials that are here")
