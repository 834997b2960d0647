"""docs/tutorial.ipynb: it runs, and is committed with outputs that are those of a run and name no machine."""

import json
import re

import pytest
from programs import ROOT, load_script

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def committed():
    return json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(cell):
    return "".join("".join(x["text"]) for x in cell["outputs"] if x["output_type"] == "stream")


def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the kernel: threads cost more than they save on a busy machine
    cells = code_cells(load_script(DOCS / "execute_tutorial.py").execute(tmp_path))
    text = "\n".join(map(text_of, cells))
    # It has learned something, and the second pass has better boxes and masks than the first.
    (segm_ap,) = re.findall(r"segm +([\d.]+)", text)
    assert float(segm_ap) > 20
    first, second = ([float(x) for x in re.findall(r"[\d.]+", row)] for row in re.findall(r"pass [12] +(.*)", text))
    assert second[0] > first[0] + 3 and second[1] > first[1] + 3
    # The loss of the categories reaches the boxes of stage 1 and the masks, and that of the first masks no boxes.
    assert re.search(r"loss_cls_s3 +\S+ +yes +yes *$", text, flags=re.M)
    assert re.search(r"loss_mask_s2 +\S+ +yes *$", text, flags=re.M)
    assert (tmp_path / "output" / "tutorial" / "run" / "report.html").exists()


def test_the_outputs_are_those_of_a_run_from_top_to_bottom(committed):
    cells = code_cells(committed)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {x["output_type"] for cell in cells for x in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not any(x.get("name") == "stderr" for cell in cells for x in cell["outputs"])


def test_the_outputs_are_small_and_name_no_folder_of_a_machine(committed):
    assert (DOCS / "tutorial.ipynb").stat().st_size < 600_000
    for cell in code_cells(committed):
        text = text_of(cell) + json.dumps([x["data"].get("text/plain", "") for x in cell["outputs"] if "data" in x])
        assert re.findall(r"(?<![\w.])/\w+/\S*", text) == []
