"""Compiled pipelines, and their versions on the server."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from osft.orchestration.connection import NotFoundError, all_pages, api_errors, links_to_stderr, named
from osft.process.errors import explained
from osft.storage.paths import expanded

if TYPE_CHECKING:
    import kfp

CHECKOUT_YAML = Path(__file__).parents[2] / "pipelines" / "continual_learning" / "continual_learning.yaml"
"""The pipeline of this project, where osft runs from its checkout; the wheel has no pipelines."""

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class CompiledPipeline:
    """A pipeline as kfp's compiler writes it: a YAML file."""

    name: str
    parameters: Mapping[str, Mapping[str, Any]]
    """Name -> {"parameterType": …, "defaultValue": …, "description": …}, as in the YAML."""
    text: str

    @classmethod
    def read(cls, file: str | Path | None = None) -> "CompiledPipeline":
        """Read a compiled YAML file; None: the one of the checkout that osft runs from.

        Raises FileNotFoundError if there is none, ValueError if it is not a compiled pipeline.
        """
        path = Path(expanded(str(file))) if file else CHECKOUT_YAML
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            hint = "" if file else "; give the compiled YAML with --pipeline FILE, or an uploaded one's --pipeline-name"
            raise FileNotFoundError(f"there is no pipeline {path}{hint}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a compiled pipeline: {explained(error)}") from None
        try:
            (spec, *_) = yaml.safe_load_all(text)
            return cls(name=spec["pipelineInfo"]["name"], parameters=_parameters(spec), text=text)
        except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{path} is not a pipeline that kfp's compiler wrote (for Pipelines 2)") from None

    @property
    def digest(self) -> str:
        """Of the content: comments and the order of keys do not count."""
        return content_digest(list(yaml.safe_load_all(self.text)))

    @property
    def version_name(self) -> str:
        """Name of this content's version on the server."""
        return f"sha256-{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class UploadedPipeline:
    """A version of a pipeline on the server."""

    name: str
    pipeline_id: str
    version_id: str
    version_name: str
    parameters: Mapping[str, Mapping[str, Any]]
    follows_latest: bool = False
    """A schedule's runs take the version that is the newest when they start."""


def content_digest(content: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def upload(
    client: "kfp.Client", pipeline: CompiledPipeline, *, name: str | None = None, follow_latest: bool = False
) -> UploadedPipeline:
    """Make a pipeline's content a version on the server; the same content is not uploaded again.

    The version's name is the content's hash. A pipeline is created empty and its versions are added: what `upload`
    of the API creates at once would be a version with the pipeline's name.

    Raises: ValueError if `follow_latest` is asked for and a newer version than this content is there; as `api_errors`.
    """
    name = name or pipeline.name
    namespace = client.get_user_namespace() or None
    existing = _find(client, name)
    if existing is None:
        from kfp_server_api import V2beta1Pipeline

        with api_errors():
            existing = client.pipelines.pipeline_service_create_pipeline(
                pipeline=V2beta1Pipeline(display_name=name, namespace=namespace)
            )
    version = _version(client, existing.pipeline_id, pipeline.version_name)
    if version is None:
        with tempfile.TemporaryDirectory() as folder, api_errors(), links_to_stderr():
            file = Path(folder) / "pipeline.yaml"  # the server looks at the suffix
            file.write_text(pipeline.text, encoding="utf-8")
            version = client.upload_pipeline_version(
                str(file),
                pipeline_version_name=pipeline.version_name,
                pipeline_id=existing.pipeline_id,
                description=f"sha256:{pipeline.digest}",
            )
    elif follow_latest:
        newest = find_pipeline(client, name)
        if newest.version_id != version.pipeline_version_id:
            raise ValueError(
                f"the newest version of {name!r} is {newest.version_name}, and this file is {pipeline.version_name}: "
                "pin it, or follow the newest with --pipeline-name and without --pipeline"
            )
    return UploadedPipeline(
        name=name,
        pipeline_id=existing.pipeline_id,
        version_id=version.pipeline_version_id,
        version_name=pipeline.version_name,
        parameters=pipeline.parameters,
        follows_latest=follow_latest,
    )


def find_pipeline(client: "kfp.Client", name: str, version: str | None = None) -> UploadedPipeline:
    """A version of a pipeline that is on the server: a name or id; None: the newest now; "latest": for a schedule
    also the newest later.

    Raises: NotFoundError if there is no such pipeline or version, and as `api_errors`.
    """
    pipeline = _find(client, name)
    if pipeline is None:
        raise NotFoundError(f"there is no pipeline {name!r} on the server: upload it with --pipeline FILE")
    if version in (None, LATEST):
        with api_errors():
            page = client.list_pipeline_versions(pipeline.pipeline_id, page_size=1, sort_by="created_at desc")
        found = (page.pipeline_versions or [None])[0]
    else:
        found = _version(client, pipeline.pipeline_id, str(version))
    if found is None:
        raise NotFoundError(f"the pipeline {name!r} has no version {version or ''}".rstrip())
    spec = found.pipeline_spec
    return UploadedPipeline(
        name=name,
        pipeline_id=pipeline.pipeline_id,
        version_id=found.pipeline_version_id,
        version_name=found.display_name,
        parameters=_parameters(spec.get("pipeline_spec") or spec),
        follows_latest=version == LATEST,
    )


def _find(client: "kfp.Client", name: str) -> Any:
    namespace = client.get_user_namespace() or None
    found = all_pages(client.list_pipelines, "pipelines", filter=named(name), namespace=namespace)
    return next((pipeline for pipeline in found if pipeline.display_name == name), None)


def _version(client: "kfp.Client", pipeline_id: str, wanted: str) -> Any:
    found = all_pages(client.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline_id)
    return next((one for one in found if wanted in (one.display_name, one.pipeline_version_id)), None)


def _parameters(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    return found
