"""The compiled pipeline by kfp.local with every step in this process: the same YAML, the same code of each component.

It saves the seconds that starting a process costs. `before_step` is called with a component's name before it runs.
"""

import json
import traceback
from collections.abc import Callable
from typing import Any

from kfp import components, local
from kfp.dsl.executor import Executor
from kfp.local import subprocess_task_handler

from pipelines.run_local import without_retries

BeforeStep = Callable[[str], None]


def run_steps_in_process(monkeypatch, before_step: BeforeStep = lambda name: None) -> None:
    """From now on kfp.local starts no processes. What `before_step` raises ends the step as a crash would."""

    def run(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        source, arguments = full_command[3], full_command[4:]
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        name = given["--function_to_execute"]
        module: dict[str, Any] = {"__name__": f"component_{name}"}
        exec(compile(source, f"<{name}>", "exec"), module)
        try:
            before_step(name)
            Executor(json.loads(given["--executor_input"]), module[name]).execute()
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    monkeypatch.setattr(subprocess_task_handler, "run_local_subprocess", run)


def run_pipeline(yaml: str, arguments: dict[str, Any], root: str) -> None:
    """Run a compiled pipeline to its end. Raises RuntimeError if a step fails."""
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root, raise_on_error=True)
    components.load_component_from_text(without_retries(yaml))(**arguments)
