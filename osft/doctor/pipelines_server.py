"""Whether the Pipelines server answers, which release it is, and whether it knows the calls that osft makes."""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from osft.doctor.finding import Finding, NotChecked, error, ok, separated, warning
from osft.doctor.subject import Subject
from osft.doctor.versions import version_of
from osft.orchestration.connection import api_errors, connect
from osft.storage.paths import expanded

OLDEST = (2, 0)
"""The first with the API v2beta1, and with compiled pipelines of this format."""
KEEPS_RUNS = (2, 16)
"""Since then a schedule can be deleted without the round that it started."""


def check_pipelines(subject: Subject) -> Iterator[Finding]:
    """Does the Pipelines server answer, and does its release go with the client here?"""
    token = expanded(str(subject.token_file)) if subject.token_file else None
    cookie_file = Path(expanded(str(subject.cookie_file))) if subject.cookie_file else None
    try:
        cookies = cookie_file.read_text(encoding="utf-8").strip() if cookie_file else None
        client = connect(subject.host, namespace=subject.namespace, token_file=token, cookies=cookies)
    except ConnectionError as failure:
        yield error(
            "Pipelines server", str(failure), "Check --host or KFP_ENDPOINT, and that the Deployment ml-pipeline runs"
        )
        return
    except PermissionError as refusal:
        yield error("Pipelines server", *separated(refusal))
        return
    except (ValueError, FileNotFoundError) as reason:
        raise NotChecked(str(reason)) from None
    about = f"Pipelines server {urlsplit(client.healthzs.api_client.configuration.host).netloc}"
    with api_errors():
        answer = json.loads(client.healthzs.healthz_service_get_healthz(_preload_content=False).data)
    yield _release(about, str(answer.get("tag_name", "")))
    if answer.get("multi_user") and not subject.namespace:
        remedy = "Give the profile's: --namespace (for osft submit and schedule, too)"
        yield warning(about, "serves several users, and no namespace is given", remedy)


def _release(about: str, tag: str) -> Finding:
    client = importlib.metadata.version("kfp")
    server, ours = version_of(tag), version_of(client)
    if server is None or ours is None:
        return ok(
            about, f"answers, and does not tell its release (it says {tag or 'nothing'}); the client here is {client}"
        )
    if server < OLDEST:
        remedy = "Upgrade Kubeflow Pipelines to 2.x: it cannot run what is compiled here"
        return error(about, f"is release {tag}, the client here {client}", remedy)
    if server < KEEPS_RUNS:
        text = (
            f"is release {tag}, the client here {client}: replacing or deleting a schedule would end its running round"
        )
        remedy = (
            f"Upgrade Kubeflow Pipelines to {'.'.join(map(str, KEEPS_RUNS))}, or change schedules when no round runs"
        )
        return warning(about, text, remedy)
    if server[0] != ours[0]:
        return warning(
            about, f"is release {tag}, the client here {client}", f"Install kfp {server[0]}.{server[1]} here"
        )
    return ok(about, f"is release {tag}, the client here {client}")
