"""The benchmark of a GPU: its dry run on a CPU, what it counts, and where tests have their tensors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from devices import OnDevice

from mnc_d2.layers import clip_boxes, image_corners, to_device
from mnc_d2.modeling import RoIWarpPooler
from mnc_d2.modeling.roi_heads.loss_reduction import mean_over_images
from mnc_d2.modeling.roi_heads.mask_supervision import instance_mask_iou

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the benchmarks on the path, as when one of them is run."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_dry_run_fills_the_table(benchmarks, tmp_path, capsys):
    import gpu

    # The part "tests" would run pytest in pytest.
    parts = [x for x in gpu.PARTS if x != "tests"]
    path = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--repeats", "1", "--output", str(path), "--parts", *parts]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {x["part"] for x in rows} == {"all", *parts}
    assert not [x for x in rows if x["good"] is False or x["measure"] == "failed"]
    stages = [x["what"] for x in rows if x["part"] == "stages"]
    assert [x.split(", ")[1] for x in stages[:8]] == list(gpu.PAPER_SECONDS)[:1] + ["stage 1"] + list(
        gpu.PAPER_SECONDS
    )[1:]
    table = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    assert len(table) == len(rows) + 2


def test_without_a_gpu_it_says_so(benchmarks, capsys):
    import gpu

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "finds no GPU" in capsys.readouterr().err


def test_a_part_that_fails_leaves_the_others(benchmarks, monkeypatch, capsys):
    import gpu

    def fail(bench):
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(gpu, "PARTS", {"first": fail, "second": lambda bench: bench.add("x", "y", 0.5)})
    assert gpu.main(["--device", "cpu", "--parts", "first", "second"]) == 1
    table = capsys.readouterr().out
    assert "RuntimeError" in table and "0.5" in table


@pytest.mark.parametrize(
    "waits, count",
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: (x > 0).nonzero(), 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: to_device([1.0], x.device), 0),
        (lambda x: x[torch.arange(2)], 0),
        (lambda x: x.masked_fill(x > 0, 1.0) + x.sum(), 0),
    ],
)
def test_what_a_gpu_would_be_waited_for_is_counted(benchmarks, waits, count):
    from synchronisations import count_synchronisations

    x = torch.arange(3.0)
    with count_synchronisations("cpu") as places:
        waits(x)
    assert sum(places.values()) == count


def pool():
    features = [torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)]
    rois = torch.tensor([[0.0, 1.0, 2.0, 30.0, 40.0], *[[1.0, 5.0, 5.0, 60.0, 60.0]] * 2])
    return RoIWarpPooler(4, [1 / 4, 1 / 8])(features, rois)


@pytest.mark.parametrize(
    "call",
    [
        pool,
        lambda: mean_over_images(torch.ones(3), [1, 2]),
        lambda: clip_boxes(torch.ones(3, 4), image_corners([(10, 20)], torch.ones(3, 4))),
        lambda: instance_mask_iou(torch.ones(2, 4, 4) > 0, torch.ones(2, 4, 4), torch.ones(2, 4), torch.ones(2)),
    ],
    ids=["RoIWarpPooler", "mean_over_images", "clip_boxes", "instance_mask_iou"],
)
def test_a_gpu_is_not_waited_for(benchmarks, call):
    from synchronisations import count_synchronisations

    with count_synchronisations("cpu") as places:
        call()
    assert not places


def test_waits_are_named_by_the_line_of_the_library(benchmarks):
    from synchronisations import count_synchronisations

    from mnc_d2.modeling.roi_heads.labels import sample_rois

    with count_synchronisations("cpu") as places:
        sample_rois(torch.zeros(3, dtype=torch.int64), torch.ones(3), 1, 2, 0.5)
    (place,) = {x.partition(":")[0] for x in places}
    assert place == "mnc_d2/modeling/roi_heads/labels.py"


def test_tests_have_their_tensors_on_the_device_and_the_library_has_its_own():
    with OnDevice("meta"):
        made = torch.ones(2, requires_grad=True)
        named = torch.ones(2, device="cpu")
        of_library = to_device([1.0], torch.device("cpu"))
    assert (made.device.type, named.device.type, of_library.device.type) == ("meta", "cpu", "cpu")
    assert made.requires_grad and made.is_leaf
