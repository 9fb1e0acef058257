"""The notebooks of `examples/`, executed by a real kernel."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

Execute = Callable[..., NotebookNode]


@pytest.fixture(scope="module")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execute]:
    """Execute a notebook with its cell `parameters` replaced or followed by code, and return it with its outputs.

    It runs in an empty folder: what a notebook needs it finds from any. Raises CellExecutionError as a cell does.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))  # this checkout, whichever one is installed
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            environment.setenv(name, str(tmp_path_factory.mktemp(name.lower())))

        def run(name: str, parameters: str, *, seconds_a_cell: int = 60, **variables: str) -> NotebookNode:
            for variable, value in variables.items():
                environment.setenv(variable, value)
            notebook = nbformat.read(EXAMPLES / name, as_version=4)
            (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
            cell.source += f"\n{parameters}"
            where = {"metadata": {"path": str(tmp_path_factory.mktemp("elsewhere"))}}
            NotebookClient(notebook, kernel_name="python3", timeout=seconds_a_cell, resources=where).execute()
            return notebook

        yield run


def shown(notebook: NotebookNode, cell_id: str) -> str:
    """The text that a cell has printed and displayed, without its colours."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    texts = [
        output.text if output.output_type == "stream" else output.data.get("text/plain", "") for output in cell.outputs
    ]
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(texts))
