"""What a round is to be run with: the parameters of a compiled pipeline, and what follows from them for a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from osft import storage
from osft.kubernetes.manifest import Storage
from osft.kubernetes.settings import JobSettings, job_parameters
from osft.orchestration import CompiledPipeline, pipeline_arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """The pipeline's parameters, defaults and all, and the images that it was compiled with."""

    values: Mapping[str, Any]
    """Name -> value. A parameter without a default that was not given is missing."""
    step_images: tuple[str, ...]
    training_image: str

    @classmethod
    def read(cls, pipeline: Path | None, file: Path | None, settings: list[str]) -> "Configuration":
        """Of a compiled pipeline (None: the checkout's), a file of parameters and NAME=VALUE over it.

        Raises ValueError and FileNotFoundError for what cannot be used, as `osft submit` does.
        """
        compiled = CompiledPipeline.read(pipeline)
        defaults = {
            name: known["defaultValue"] for name, known in compiled.parameters.items() if "defaultValue" in known
        }
        given = pipeline_arguments(compiled.parameters, file, settings)
        (spec, *_) = yaml.safe_load_all(compiled.text)
        containers = [found["container"] for found in spec["deploymentSpec"]["executors"].values()]
        return cls(
            values=defaults | given,
            step_images=tuple(dict.fromkeys(found["image"] for found in containers)),
            training_image=_constant(spec, "training_image"),
        )

    @property
    def launcher(self) -> str:
        """Where training runs."""
        return str(self.values.get("launcher", "local"))

    @property
    def job(self) -> JobSettings:
        """The settings of the training job."""
        return JobSettings.from_parameters(job_parameters(self.values.get("job"), self.values.get("pytorchjob")))

    @property
    def job_image(self) -> str:
        """The image of the job's pods; "" if there is none."""
        return self.job.image or self.training_image

    @property
    def images(self) -> tuple[str, ...]:
        """Every image that a round's pods need."""
        of_job = (self.job_image,) if self.launcher != "local" and self.job_image else ()
        return tuple(dict.fromkeys([*self.step_images, *of_job]))

    @property
    def storage_root(self) -> str:
        """The folder or URI that all steps share."""
        return str(self.values.get("storage_root", ""))

    @property
    def storage(self) -> Storage:
        """What the pods mount, or the secret with which they reach an object store."""
        if storage.is_remote(self.storage_root):
            return Storage(secret=self.text("storage_secret") or None)
        return Storage(claim=self.text("storage_claim") or None)

    def text(self, name: str) -> str:
        """A parameter that is a text; "" where it is not given."""
        return str(self.values.get(name) or "")


def _constant(value: Any, name: str) -> str:
    """The first constant that a task of a compiled pipeline is given as its parameter `name`; "" if there is none."""
    if isinstance(value, Mapping):
        given = value.get(name)
        if isinstance(given, Mapping) and isinstance(given.get("runtimeValue"), Mapping):
            return str(given["runtimeValue"].get("constant", ""))
        return next((found for part in value.values() if (found := _constant(part, name))), "")
    return ""
