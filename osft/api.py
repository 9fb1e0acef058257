"""The documented function `osft()`, its class form, and the registry behind both.

Names, parameters, their order and defaults are those of training_hub, so that changing the import is the whole
migration. None means "the default", which is `TrainConfig`'s; what training_hub calls backend-specific parameters
(`**kwargs`) are the other fields of `TrainConfig`.
"""

import functools
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic.fields import FieldInfo

from osft.settings import compatibility
from osft.settings.base import default_text, plain_type, refuse_missing, refuse_unknown, type_text
from osft.settings.training import TrainConfig, grouped_fields

if TYPE_CHECKING:
    from osft.training.callbacks import TrainingCallback
    from osft.training.plan import TrainingPlan
    from osft.training.result import TrainResult

F = TypeVar("F", bound=Callable[..., Any])


def run(
    config: TrainConfig, callbacks: "Sequence[TrainingCallback] | TrainingCallback" = ()
) -> "TrainResult | TrainingPlan":
    """Train as `config` says, with tracking; what `osft()`, `osft train` and the component share.

    Returns a TrainingPlan with `dry_run`. Raises as `osft()`.
    """
    from osft.process.errors import explained
    from osft.training.callbacks import CALLBACK_RAISED

    try:
        return _planned(config) if config.dry_run else _trained(config, callbacks)
    except Exception as error:
        told = explained(error)
        if told is None or told is error or CALLBACK_RAISED in getattr(error, "__notes__", ()):
            raise
        raise told from error


def check_places(config: TrainConfig) -> None:
    """Raise ValueError for a place that nothing can be written to, and for an MLflow address that is none."""
    from osft.storage.paths import check_writable
    from osft.tracking.addresses import checked_address

    for name in ("ckpt_output_dir", "data_output_dir", "tensorboard_log_dir"):
        if getattr(config, name):
            check_writable(name, getattr(config, name))
    address = config.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if address:
        checked_address(address, make=False)


def _planned(config: TrainConfig) -> "TrainingPlan":
    from osft.training.plan import plan

    check_places(config)
    return plan(config)


def _trained(config: TrainConfig, callbacks: "Sequence[TrainingCallback] | TrainingCallback") -> "TrainResult":
    from osft.tracking.training_run import tracked
    from osft.training import train
    from osft.training.callbacks import HOOKS

    followers = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
    for follower in followers:
        if isinstance(follower, type) or not any(callable(getattr(follower, hook, None)) for hook in HOOKS):
            raise ValueError(
                f"callbacks must be TrainingCallback objects, got {follower!r} ({type(follower).__name__})"
            )
    check_places(config)
    with tracked(config) as trackers:
        return train(config, [*followers, *trackers])


class Backend(ABC):
    """What carries out an algorithm."""

    @abstractmethod
    def execute_training(self, algorithm_params: dict[str, Any]) -> Any:
        """Train with these parameters and return the result."""


class Algorithm(ABC):
    """A way to train, on one of its backends."""

    def __init__(self, backend: Backend, **kwargs: Any) -> None:
        self.backend, self.kwargs = backend, kwargs

    @abstractmethod
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train and return the backend's result."""

    @abstractmethod
    def get_required_params(self) -> dict[str, Any]:
        """Name and type of each parameter that must be given."""

    @abstractmethod
    def get_optional_params(self) -> dict[str, Any]:
        """Name and type of each other parameter."""


class AlgorithmRegistry:
    """The algorithms and their backends, by name."""

    _algorithms: dict[str, type[Algorithm]] = {}  # noqa: RUF012 (the registry is the class)
    _backends: dict[str, dict[str, type[Backend]]] = {}  # noqa: RUF012

    @classmethod
    def register_algorithm(cls, name: str, algorithm_class: type[Algorithm]) -> None:
        """Add an algorithm."""
        cls._algorithms[name] = algorithm_class
        cls._backends.setdefault(name, {})

    @classmethod
    def register_backend(cls, algorithm_name: str, backend_name: str, backend_class: type[Backend]) -> None:
        """Add a backend to an algorithm. Raises ValueError if there is no such algorithm."""
        cls.get_algorithm(algorithm_name)
        cls._backends[algorithm_name][backend_name] = backend_class

    @classmethod
    def get_algorithm(cls, name: str) -> type[Algorithm]:
        """The class of an algorithm. Raises ValueError that lists what there is."""
        if name not in cls._algorithms:
            raise ValueError(f"there is no algorithm {name!r}. Registered are: {', '.join(cls._algorithms)}")
        return cls._algorithms[name]

    @classmethod
    def get_backend(cls, algorithm_name: str, backend_name: str) -> type[Backend]:
        """The class of a backend. Raises ValueError that lists what there is."""
        cls.get_algorithm(algorithm_name)
        backends = cls._backends[algorithm_name]
        if backend_name not in backends:
            raise ValueError(
                f"there is no backend {backend_name!r} for {algorithm_name!r}. Registered are: {', '.join(backends)}"
            )
        return backends[backend_name]

    @classmethod
    def list_algorithms(cls) -> list[str]:
        """Names of all algorithms."""
        return list(cls._algorithms)

    @classmethod
    def list_backends(cls, algorithm_name: str) -> list[str]:
        """Names of an algorithm's backends; none if there is no such algorithm."""
        return list(cls._backends.get(algorithm_name, {}))


def create_algorithm(algorithm_name: str, backend_name: str | None = None, **kwargs: Any) -> Algorithm:
    """An algorithm on a backend, the first registered one if none is named.

    Raises ValueError if either does not exist.
    """
    algorithm_class = AlgorithmRegistry.get_algorithm(algorithm_name)
    backends = AlgorithmRegistry.list_backends(algorithm_name)
    if backend_name is None and not backends:
        raise ValueError(f"the algorithm {algorithm_name!r} has no backend")
    backend = AlgorithmRegistry.get_backend(algorithm_name, backend_name or backends[0])()
    return algorithm_class(backend=backend, **kwargs)


class MiniTrainerBackend(Backend):
    """The built-in engine, under the documented name of the only backend. It does not need mini-trainer."""

    def execute_training(self, algorithm_params: dict[str, Any]) -> "TrainResult | TrainingPlan":
        """Train with the fields of `TrainConfig` (None for the default) and `callbacks`."""
        given = dict(algorithm_params)
        callbacks = given.pop("callbacks", None) or ()
        return run(TrainConfig.from_parameters(given), callbacks)


def _refuses_missing(function: F) -> F:
    """Make a call without a required parameter a ValueError, which the contract wants; Python's own is a TypeError."""
    signature = inspect.signature(function)
    required = [
        name for name, p in signature.parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, field in compatibility.RENAMED.items():
            if field in required and name in kwargs and field not in kwargs:
                kwargs[field] = kwargs.pop(name)  # a call that knows mini-trainer's names only
        given = signature.bind_partial(*args, **kwargs).arguments
        refuse_missing(name for name in required if given.get(name) is None)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _documented(function: F) -> F:
    """Complete a docstring with those of `TrainConfig`'s fields."""
    known = {name: field for group in grouped_fields().values() for name, field in group.items()}
    own = inspect.signature(function).parameters
    described = {name: known[name] for name in own if name in known}
    more = {name: field for name, field in known.items() if name not in own}
    doc = inspect.cleandoc(function.__doc__ or "")
    for place, listed in (("{parameters}", described), ("{more_parameters}", more)):
        doc = doc.replace(f"    {place}", _listing(listed))
    function.__doc__ = doc
    return function


def _listing(described: Mapping[str, FieldInfo]) -> str:
    lines = []
    for name, field in described.items():
        default = "" if field.is_required() else f", default {default_text(field)}"
        lines.append(f"    {name} ({type_text(field)}{default}):")
        lines += [f"        {line}" for line in (field.description or "").splitlines()]
    return "\n".join(lines)


class OSFTAlgorithm(Algorithm):
    """Orthogonal Subspace Fine-Tuning as a class: `OSFTAlgorithm(backend).train(...)`.

    `backend` is an object, or the name of a registered one. Raises ValueError for a name that is not registered.
    """

    def __init__(self, backend: Backend | str = "mini-trainer", **kwargs: Any) -> None:
        if isinstance(backend, str):
            backend = AlgorithmRegistry.get_backend("osft", backend)()
        super().__init__(backend, **kwargs)

    def get_required_params(self) -> dict[str, Any]:
        """Name and type of each parameter that must be given."""
        fields = TrainConfig.model_fields
        return {name: plain_type(field.annotation) for name, field in fields.items() if field.is_required()}

    def get_optional_params(self) -> dict[str, Any]:
        """Name and type of each other parameter."""
        fields = TrainConfig.model_fields
        optional = {name: plain_type(field.annotation) for name, field in fields.items() if not field.is_required()}
        return optional | {"callbacks": list}

    @_refuses_missing
    def train(
        self,
        model_path: str,
        data_path: str,
        unfreeze_rank_ratio: float,
        effective_batch_size: int,
        max_tokens_per_gpu: int,
        max_seq_len: int,
        learning_rate: float,
        ckpt_output_dir: str,
        **kwargs: Any,
    ) -> Any:
        """Train with the parameters of `osft()`, by name, but for `backend`. Raises as `osft()`."""
        required = {
            "model_path": model_path,
            "data_path": data_path,
            "unfreeze_rank_ratio": unfreeze_rank_ratio,
            "effective_batch_size": effective_batch_size,
            "max_tokens_per_gpu": max_tokens_per_gpu,
            "max_seq_len": max_seq_len,
            "learning_rate": learning_rate,
            "ckpt_output_dir": ckpt_output_dir,
        }
        refuse_unknown(kwargs, [*self.get_required_params(), *self.get_optional_params(), *compatibility.NAMES])
        return self.backend.execute_training(required | kwargs)


AlgorithmRegistry.register_algorithm("osft", OSFTAlgorithm)
AlgorithmRegistry.register_backend("osft", "mini-trainer", MiniTrainerBackend)


@_refuses_missing
@_documented
def osft(
    model_path: str,
    data_path: str,
    unfreeze_rank_ratio: float,
    effective_batch_size: int,
    max_tokens_per_gpu: int,
    max_seq_len: int,
    learning_rate: float,
    ckpt_output_dir: str,
    data_output_dir: str | None = None,
    backend: str = "mini-trainer",
    target_patterns: list[str] | None = None,
    seed: int | None = None,
    use_liger: bool | None = None,
    use_processed_dataset: bool | None = None,
    unmask_messages: bool | None = None,
    is_pretraining: bool | None = None,
    block_size: int | None = None,
    document_column_name: str | None = None,
    lr_scheduler: str | None = None,
    warmup_steps: int | None = None,
    lr_scheduler_kwargs: dict[str, str] | None = None,
    checkpoint_at_epoch: bool | None = None,
    save_final_checkpoint: bool | None = None,
    num_epochs: int | None = None,
    nproc_per_node: int | None = None,
    nnodes: int | None = None,
    node_rank: int | None = None,
    rdzv_id: int | None = None,
    rdzv_endpoint: str | None = None,
    **kwargs: Any,
) -> Any:
    """Teach a language model new data by Orthogonal Subspace Fine-Tuning (arXiv:2504.07097) without forgetting.

    Prepares the data, splits the target weights by SVD, freezes the directions with large singular values, trains in
    the rest, and writes a plain Hugging Face model. None stands for the default that is given here.

    Args:
        {parameters}
        backend (str, default 'mini-trainer'):
            The built-in engine, under the documented name. Other engines can be registered (AlgorithmRegistry).

    Further parameters, by name:
        {more_parameters}
        callbacks (TrainingCallback or a list of them):
            Called in this process while training runs (osft.TrainingCallback).

    Returns:
        TrainResult: checkpoint, metrics history, counts, timings, peak memory and rank layout; or with dry_run a
        TrainingPlan.

    Raises:
        ValueError: A parameter is missing, unknown, of a wrong type or out of range; data or settings cannot work; a
            path cannot be read or written to. Nothing was started then, and nothing lost.
        FileNotFoundError: model_path or data_path does not exist, or is incomplete.
        RuntimeError: Training failed; the message holds the traceback of the process that failed first. Also a full
            disk, or too little memory: the same call resumes from the saved state.
        ConnectionError: An object store or another node does not answer. A tracking server that is away ends nothing.
    """
    given = dict(locals())
    more: Mapping[str, Any] = given.pop("kwargs")
    algorithm = create_algorithm("osft", given.pop("backend"))
    return algorithm.train(**{name: value for name, value in given.items() if value is not None}, **more)
