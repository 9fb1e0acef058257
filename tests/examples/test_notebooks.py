"""What holds for every committed notebook."""

from itertools import pairwise

import nbformat
import pytest

from tests.examples.conftest import EXAMPLES

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_committed_without_what_an_execution_leaves(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id
        assert set(cell.metadata) <= {"tags"}, cell.id


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_every_code_cell_comes_after_a_text_that_says_what_it_does(file):
    cells = nbformat.read(file, as_version=4).cells
    for before, cell in pairwise(cells):
        assert "markdown" in (before.cell_type, cell.cell_type), cell.id
