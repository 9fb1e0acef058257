"""Public benchmarks, by the lm-evaluation-harness (the extra `osft[eval]`).

A benchmark is named as there: a task, a group (its aggregate counts) or a tag (each of its tasks counts). Its data
comes from where its YAML file says, most often the Hugging Face hub. Tasks of one's own are YAML files in a folder;
paths of data files in them count from the YAML file, so that such a folder needs no network.

Prompts are the tasks' own, without the model's chat template, as published numbers are made.

https://github.com/EleutherAI/lm-evaluation-harness/tree/v0.4.13/docs
"""

import difflib
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft import storage
from osft.evaluation.record import BenchmarkScore, BenchmarkTask
from osft.process.private_names import task_yaml

BATCH_SIZES = {"cpu": 4, "cuda": 16}
"""Requests at once. Fixed, because padding to another batch moves the last digits."""
_BOOTSTRAP_SAMPLES = 1000
"""For the standard errors that have no formula."""


class Benchmarks:
    """Benchmarks that can be run: their tasks are known, allowed, and their data is there.

    names: of tasks, groups or tags. folder: path or URI of YAML files, which go before the harness's own tasks.
    max_samples: the first so many questions of each task are asked; 0: all.

    Raises ValueError without the extra, for a name that is not known, for a task that runs or downloads code or needs
    more than text, and for data that cannot be loaded; FileNotFoundError if there is no such folder.
    """

    def __init__(self, names: Sequence[str], *, folder: str | None = None, max_samples: int = 0) -> None:
        try:
            import lm_eval.models.huggingface  # noqa: F401  # what `run` needs
        except ImportError as error:
            problem = f"benchmarks need the extra osft[eval] ({error})"
            raise ValueError(f"{problem}. Install it: pip install 'osft[eval]'") from None
        self._limit = max_samples or None
        self._folder = None if folder is None else storage.fetch(folder).absolute()
        if self._folder and not self._folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} of benchmarks")
        self._manager = _task_manager(names, self._folder)
        for name in names:
            for task, config in _configs(self._manager.task_index, name):
                _check_safe(task, config)
        self._loaded = [item for name in names for item in self._load(name)]
        self.described = {name: self._describe(name, item) for name, item in self._reported()}
        """By benchmark."""
        self.content_hash = self._content_hash()
        """Of all that determines the results of a model."""

    @property
    def names(self) -> list[str]:
        """The benchmarks that have a result."""
        return list(self.described)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, BenchmarkScore]:
        """By benchmark; a standard error is None where the harness has none."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZES[model.device.type])
        found: Any = simple_evaluate(
            model=wrapped,
            tasks=self._loaded,
            task_manager=self._manager,
            limit=self._limit,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
        )
        results = {}
        for name, described in self.described.items():
            numbers = found["results"][name]
            # One value for each filter of the answers; the first is the task's main one.
            filters = [key.split(",", 1)[1] for key in numbers if key.startswith(f"{described.metric},")]
            if not filters:
                raise ValueError(f"benchmark {name} has no result for {described.metric!r}, only {list(numbers)}")
            value, stderr = (numbers.get(f"{described.metric}{part},{filters[0]}") for part in ("", "_stderr"))
            error = None if stderr in (None, "N/A") else float(stderr)
            results[name] = BenchmarkScore(value=float(value), stderr=error)
        return results

    def _load(self, name: str) -> list[Any]:
        """The tasks or the group of a name, with their data."""
        index = self._manager.task_index
        try:
            for entry in [index[task] for task, _ in _configs(index, name) if task in index]:
                if self._folder and entry.yaml_path and entry.yaml_path.is_relative_to(self._folder):
                    _find_data(entry)
            loaded = self._manager.load([name])
        except Exception as error:  # of the harness, of datasets, of the task's own functions
            raise ValueError(
                f"benchmark {name} cannot be set up: {type(error).__name__}: {error}. If its data is on a hub that "
                "cannot be reached, give a folder with a YAML file that describes it with local data_files"
            ) from error
        return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())

    def _tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self._manager.load(self._loaded)["tasks"]  # refuses a task that is there twice
        return tasks

    def _reported(self) -> Iterator[tuple[str, Any]]:
        """What has a result of its own: tasks, and groups that say how to aggregate their tasks."""
        items = list(self._loaded)
        while items:
            item = items.pop(0)
            if not _is_group(item):
                yield item.task_name, item
            elif item.has_aggregation:
                yield item.name, item
            else:
                items = [*item, *items]

    def _describe(self, name: str, item: Any) -> BenchmarkTask:
        tasks = item.get_all_tasks() if _is_group(item) else [item]
        metrics = iter(tasks[0].higher_is_better())
        metric = item.aggregate_metric_list[0].metric if _is_group(item) else next(metrics, None)
        found = {task.higher_is_better().get(metric) for task in tasks}
        if found not in ({True}, {False}):
            raise ValueError(
                f"benchmark {name} does not say whether a higher {metric} is better. Set higher_is_better in the "
                "metric_list of its YAML file"
            )
        sizes = [len(task.eval_docs) for task in tasks]
        samples = sum(min(size, self._limit or size) for size in sizes)
        return BenchmarkTask(metric=str(metric), higher_is_better=found.pop(), num_samples=samples)

    def _content_hash(self) -> str:
        described = {name: task.to_dict() for name, task in self.described.items()}
        settings = [version("lm-eval"), described, self._limit, BATCH_SIZES]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, task in self._tasks().items():
            # Where the data lies does not matter, only what it says.
            config = {k: v for k, v in task.dump_config().items() if not k.startswith("dataset_") and k != "metadata"}
            few_shot = task.fewshot_docs() if config.get("num_fewshot") else []
            for part in ([name, config], *task.eval_docs, *few_shot):
                digest.update(json.dumps(part, sort_keys=True, default=_text).encode() + b"\n")
        for file in sorted(self._folder.rglob("*.py")) if self._folder else []:
            digest.update(file.read_bytes())
        return digest.hexdigest()


def _is_group(item: Any) -> bool:
    return hasattr(item, "get_all_tasks")


def _text(value: Any) -> str:
    """What a function of a task does, and not where it lies in memory; of anything else what it says."""
    try:
        return inspect.getsource(value) if callable(value) else str(value)
    except (TypeError, OSError):
        return str(value)


def _task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """Knows the tasks of the folder, and those of the harness unless the folder has all that is asked for."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else None
    if manager is None or not all(_is_complete(manager.task_index, name) for name in names):
        manager = TaskManager(include_path=str(folder) if folder else None)  # reads thousands of files, in seconds
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "`lm-eval ls tasks` lists what there is"
            raise ValueError(f"unknown benchmark {name!r}. {hint}")
    return manager


def _is_complete(index: Mapping[str, Any], name: str) -> bool:
    return name in index and all(config is not None for _, config in _configs(index, name))


def _configs(index: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The tasks and groups that a name stands for with their YAML files' content, nothing of which has been run.

    The content is None for what is not known.
    """
    entry = index.get(name)
    if entry is not None and entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _configs(index, task)
        return
    yield name, None if entry is None else entry.cfg
    if entry is not None and entry.kind.name == "GROUP":
        yield from _member_configs(index, entry.cfg)


def _member_configs(index: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    members = group.get("task") or []
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield from _configs(index, member)
        elif "group" in member and member["group"] not in index:
            yield from _member_configs(index, member)
        elif "group" in member or member.get("task") in index:
            name = member.get("group") or member["task"]
            yield name, member  # what it changes
            yield from _configs(index, name)
        else:
            yield str(member.get("task")), member


def _check_safe(name: str, config: Mapping[str, Any] | None) -> None:
    """Raise ValueError for a task that runs code that a model or a stranger wrote, or that shows images."""
    from lm_eval.api import metrics, registry  # noqa: F401  # the first fills the second

    if config is None:
        raise ValueError(f"unknown benchmark {name!r}, which one of the groups names")
    if config.get("unsafe_code"):
        raise ValueError(f"benchmark {name} runs code that the model wrote, which is not done here. Take another")
    if "class" in config:
        raise ValueError(f"benchmark {name} is a Python class, and may download code. Take one that is a YAML file")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise ValueError(f"benchmark {name} shows more than text. Take one for text")
    for metric in config.get("metric_list") or []:
        called = str(metric.get("metric"))
        known = "/" in called or called in registry.metric_registry  # a slash: a function beside the YAML file
        if metric.get("hf_evaluate") or not known:
            raise ValueError(
                f"benchmark {name} has the metric {called!r}, whose code would be downloaded and run. Take another"
            )


def _find_data(entry: Any) -> None:
    """Make the paths of an entry's data files count from its YAML file."""
    folder = entry.yaml_path.parent
    entry.cfg, entry.yaml_path = _found(task_yaml(entry.yaml_path), folder), None


def _found(value: Any, folder: Path, *, is_data: bool = False) -> Any:
    if isinstance(value, dict):
        return {
            key: _found(part, folder, is_data=is_data or key in ("data_files", "data_dir"))
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [_found(part, folder, is_data=is_data) for part in value]
    if is_data and isinstance(value, str) and not Path(value).is_absolute() and any(folder.glob(value)):
        return str(folder / value)
    return value
