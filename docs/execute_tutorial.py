"""Execute tutorial.ipynb and write its outputs into it: ``python docs/execute_tutorial.py``, after every change."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")


def execute(folder: Path | str) -> nbformat.NotebookNode:
    """Return the notebook with fresh outputs; the files that it writes go into ``folder``.

    Raises:
        CellExecutionError: a cell ends in an error.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1800,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    # What is of this machine: warnings of libraries, the version of Python.
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(folder), NOTEBOOK)


if __name__ == "__main__":
    main()
