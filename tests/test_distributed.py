"""Several processes: gradients, detections and results are those of one, and a mistake is named once."""

import io
import json
import logging
import multiprocessing
import os
import socket
import sys
from contextlib import redirect_stderr

import pytest
import small_backbone  # noqa: F401  (registers it in the processes that are started)
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from programs import TORCHRUN, arguments_for, read_metrics, run, run_here
from torch.nn.parallel import DistributedDataParallel

from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import AccumulatingTrainer, MNCTrainer, leave_process_group

# Every anchor and RoI is trained on, so that nothing is drawn at random: a step then has the mean of the gradients
# of its images, however these are divided. They differ in their numbers of RoIs and of foreground RoIs. The limit is so
# low that much of the causal gradient is clipped, as small as it is with initial weights.
GRADIENTS = "border=True, coordinates=all, mask_coordinates=True, delta_clip=1e-7"
EVERYTHING = {
    "DATALOADER.NUM_WORKERS": 0,
    "DATASETS.TEST": (),
    "DATASETS.TRAIN": ("drawn",),
    "INPUT.CROP.ENABLED": False,
    "INPUT.RANDOM_FLIP": "none",
    "MODEL.MNC.BACKGROUND_BANDS": [[0.0, 1.0, 1.0]],
    "MODEL.MNC.GRADIENTS": GRADIENTS,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1000,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 5000,
}


def gradients_of_a_step(cfg):
    """Run one iteration; return the gradients by parameter name, and what was logged."""
    seed_all_rng(3)
    trainer = MNCTrainer(cfg)
    with EventStorage() as storage:
        trainer.run_step()
    model = trainer.model.module if comm.get_world_size() > 1 else trainer.model
    logged = {name: value for name, (value, _) in storage.latest().items()}
    return {name: x.grad for name, x in model.named_parameters()}, logged


def start_two(function, *arguments):
    """Call a function with the rank and the arguments in two processes, which are forked from one without threads."""
    multiprocessing.set_forkserver_preload(["mnc_d2.engine"])  # imported once
    mp.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def run_process(rank, num_processes, cfgs, dataset, folder):
    """One of several processes on the CPU: a step from the same weights for each config."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_processes)
    comm.create_local_process_group(num_processes)
    register_coco_dataset("drawn", *dataset)
    torch.save([gradients_of_a_step(cfg) for cfg in cfgs], folder / f"{rank}.pth")
    leave_process_group()


@pytest.fixture
def drawn(coco_dataset, clean_catalogs):
    """The drawn images, with three and with four instances, registered as "drawn"."""
    register_coco_dataset("drawn", *coco_dataset)
    return coco_dataset


@pytest.fixture
def step_config(small_config, tmp_path):
    """A function that returns a config of EVERYTHING with a number of images and of batches."""

    def make(images, batches, **overrides):
        sizes = {"SOLVER.IMS_PER_BATCH": images, "SOLVER.ACCUMULATE": batches}
        return small_config(**{**EVERYTHING, **sizes, **overrides}, OUTPUT_DIR=str(tmp_path / "output"))

    return make


def assert_same_step(actual, expected):
    """Compare the gradients and the losses of two steps; elements of a gradient relative to its largest one.

    Convolutions of another number of images add in another order. The largest difference seen is 1.2e-4.
    """
    gradients, logged = actual
    expected_gradients, expected_logged = expected
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() < 3e-4 * gradient.abs().max(), name
    losses = [name for name in expected_logged if "loss" in name]
    assert len(losses) == 13
    for name in losses:
        assert logged[name] == pytest.approx(expected_logged[name], rel=1e-4), name


def test_the_images_differ_and_gradients_are_clipped(drawn, step_config):
    counts = []
    for batches in (1, 2):  # what is logged is of the last batch: one image, then the other
        _, logged = gradients_of_a_step(step_config(images=1, batches=batches))
        counts.append((logged["s3/num_fg"], logged["s5/num_fg"]))
    (first, then) = counts
    assert first[0] != then[0] and first[1] != then[1]
    clipped, free = (
        gradients_of_a_step(step_config(images=4, batches=1, **{"MODEL.MNC.GRADIENTS": gradients}))[0]
        for gradients in (GRADIENTS, f"{GRADIENTS}, delta_clip=0")
    )
    name = "proposal_generator.rpn_head.anchor_deltas.weight"
    assert (clipped[name] - free[name]).abs().max() > 1e-2 * free[name].abs().max()


@pytest.mark.parametrize("images", [1, 2])
def test_several_batches_have_the_gradients_of_one_of_all_their_images(drawn, step_config, images):
    expected = gradients_of_a_step(step_config(images=4, batches=1))
    assert_same_step(gradients_of_a_step(step_config(images=images, batches=4 // images)), expected)


def test_two_processes_have_the_gradients_of_one_with_all_images(drawn, step_config, tmp_path):
    expected = gradients_of_a_step(step_config(images=4, batches=1))
    cfgs = [step_config(images=4, batches=1), step_config(images=2, batches=2)]
    start_two(run_process, 2, cfgs, drawn, tmp_path)
    main, other = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    for steps in zip(main, other):
        assert_same_step(steps[0], expected)
        assert all(steps[1][0][name].equal(gradient) for name, gradient in steps[0][0].items())


class Line(torch.nn.Module):
    """A weight times the x of a batch's only image; x = None is refused, as the RPN refuses boxes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, batch):
        if batch[0]["x"] is None:
            raise FloatingPointError
        return {"loss": self.weight * batch[0]["x"]}


def run_fragile_process(rank, num_processes, folder):
    """Four iterations: a good one, two in which the second process has a bad batch, a good one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_processes)
    comm.create_local_process_group(num_processes)
    values = [1.0, float("nan") if rank else 1.0, None if rank else 1.0, 3.0]
    batches = [[{"file_name": f"{rank}_{i}.png", "x": x}] for i, x in enumerate(values)]
    model = DistributedDataParallel(Line())
    trainer = AccumulatingTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.25), max_skipped=2)
    log = io.StringIO()
    logging.getLogger("mnc_d2").addHandler(logging.StreamHandler(log))
    with EventStorage() as storage:
        for trainer.iter in range(len(values)):
            trainer.run_step()
            storage.step()
    torch.save({"weight": model.module.weight.item(), "log": log.getvalue()}, folder / f"{rank}.pth")
    leave_process_group()


def test_all_processes_leave_out_the_steps_that_one_cannot_make(tmp_path):
    start_two(run_fragile_process, 2, tmp_path)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pth")
        assert result["weight"] == 2 - 0.25 * 1 - 0.25 * 3
        first, second = result["log"].splitlines()
        assert first == "Iteration 1 makes no step (1 of 2): loss is not finite, with the images 1_1.png."
        assert second == "Iteration 2 makes no step (2 of 2): a box of the RPN is not finite, with the images 1_2.png."


# ---- train_net.py


def test_two_processes_train_and_evaluate(coco_dataset, tmp_path):
    options = ["--num-gpus", 2, "--dist-url", "auto"]
    overrides = ["SOLVER.ACCUMULATE", 2, "DATALOADER.NUM_WORKERS", 1]
    result = run(arguments_for(coco_dataset, tmp_path, *options, iterations=2, overrides=overrides))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("checkpoint:") == 1
    assert any("segm/AP" in line for line in read_metrics(tmp_path))
    assert [line["iteration"] for line in read_metrics(tmp_path) if "total_loss" in line] == [1]
    assert "World size: 2" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "log.txt.rank1").exists()
    assert (tmp_path / "model_final.pth").exists()


def test_two_processes_of_torchrun_find_what_one_finds(coco_dataset, model_file, tmp_path):
    overrides = [*("MODEL.WEIGHTS", model_file, "MODEL.ROI_BOX_HEAD.FC_DIM", 32), "TEST.NUM_PICTURES", 0]
    overrides += ["MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32]
    overrides += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    one, two = (arguments_for(coco_dataset, tmp_path / x, "--eval-only", overrides=overrides) for x in ("one", "two"))
    run_here(one)
    result = run(two, TORCHRUN)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(f"checkpoint: {model_file}") == 1 and "World size: 2" in result.stdout
    expected, found = (
        json.loads((tmp_path / x / "inference" / "drawn" / "coco_instances_results.json").read_text())
        for x in ("one", "two")
    )
    assert {x["image_id"] for x in expected} == {1, 2}
    assert sorted(found, key=lambda x: x["image_id"]) == sorted(expected, key=lambda x: x["image_id"])


def run_as_torchrun_does(rank, port, arguments, folder):
    """One of two processes of train_net.py, in the environment that torchrun gives it."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    sys.argv[0] = "train_net.py"
    with open(folder / f"{rank}.txt", "w") as file, redirect_stderr(file):
        with pytest.raises(SystemExit, match="1"):
            run_here(arguments)


def test_wrong_input_under_torchrun_is_one_sentence_of_the_main_process(coco_dataset, tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]  # is free now
    arguments = arguments_for(coco_dataset, tmp_path, overrides=["SOLVER.IMS_PER_BATCH", 3])
    start_two(run_as_torchrun_does, port, arguments, tmp_path)
    sentence = "train_net.py: SOLVER.IMS_PER_BATCH is 3, for 2 processes together. Give it a multiple of their number."
    main, other = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2))
    assert [line for line in main + other if line.startswith("train_net.py")] == [sentence] and sentence in main
