"""Several processes: the gradients of two are those of one, and both ways to start them run train_net.py."""

import json
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from test_train_net import SCRIPT, arguments_for, read_metrics, run

from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import MNCTrainer, leave_process_group

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]

# What it takes for a batch of two images to have the mean of the gradients of each image on its own. Every anchor and
# every RoI is trained on, so that nothing is drawn at random. Losses that are means over the RoIs of a batch are the
# mean of the means of its images only if these have the same number of RoIs, and the mask loss only if they have the
# same number of foreground RoIs: there are three instances in each image and, with such an IoU threshold, no foreground
# but their own boxes, and these once more as they were regressed for the second pass. Clipping is not linear.
EVERYTHING = {
    "DATALOADER.NUM_WORKERS": 0,
    "DATASETS.TEST": (),
    "DATASETS.TRAIN": ("drawn",),
    "INPUT.CROP.ENABLED": False,
    "INPUT.RANDOM_FLIP": "none",
    "MODEL.MNC.BACKGROUND_FRACTIONS": [1.0],
    "MODEL.MNC.BACKGROUND_IOU_BANDS": [[0.0, 1.0]],
    "MODEL.MNC.DELTA_GRADIENT_CLIP": 0.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1000,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.9],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 5000,
}


def gradients_of_a_step(cfg):
    """Run one iteration; return the gradients by parameter name, and what was logged."""
    seed_all_rng(1)
    trainer = MNCTrainer(cfg)
    with EventStorage() as storage:
        trainer.run_step()
    model = trainer.model.module if comm.get_world_size() > 1 else trainer.model
    logged = {name: value for name, (value, _) in storage.latest().items()}
    return {name: x.grad for name, x in model.named_parameters()}, logged


def run_process(rank, num_processes, cfgs, dataset, folder):
    """One of several processes on the CPU: a step from the same weights for each config."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_processes)
    comm.create_local_process_group(num_processes)
    register_coco_dataset("drawn", *dataset)
    torch.save([gradients_of_a_step(cfg) for cfg in cfgs], folder / f"{rank}.pth")
    leave_process_group()


@pytest.fixture
def equal_dataset(coco_dataset, tmp_path, clean_catalogs):
    """The drawn images with three instances each, registered as "drawn"; a fourth one is in the picture only."""
    path, root = coco_dataset
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    register_coco_dataset("drawn", path, root)
    return path, root


@pytest.fixture
def step_config(small_config, tmp_path):
    """A function that returns a config of EVERYTHING with a number of images and of batches."""

    def make(images, batches):
        sizes = {"SOLVER.IMS_PER_BATCH": images, "SOLVER.ACCUMULATE": batches}
        return small_config(**EVERYTHING, **sizes, OUTPUT_DIR=str(tmp_path / "output"))

    return make


def assert_same_step(actual, expected):
    """Compare the gradients and the losses of two steps; elements of a gradient relative to its largest one."""
    gradients, logged = actual
    expected_gradients, expected_logged = expected
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name
    losses = [name for name in expected_logged if "loss" in name]
    assert len(losses) == 11
    for name in losses:
        assert logged[name] == pytest.approx(expected_logged[name], rel=1e-4), name


def test_the_images_are_such_that_batches_can_be_compared(equal_dataset, step_config):
    counts = []
    for batches in (1, 2):  # what is logged is of the last batch: one image, then the other
        _, logged = gradients_of_a_step(step_config(images=1, batches=batches))
        counts.append((logged["s3/num_fg"], logged["s5/num_fg"], logged["loss_cls_s3"]))
    (first, then) = counts
    assert first[:2] == then[:2] == (3, 6)
    assert first[2] != then[2]


def test_two_batches_have_the_gradients_of_one_of_both(equal_dataset, step_config):
    expected = gradients_of_a_step(step_config(images=2, batches=1))
    assert_same_step(gradients_of_a_step(step_config(images=1, batches=2)), expected)


def test_two_processes_have_the_gradients_of_one_with_both_images(equal_dataset, step_config, tmp_path):
    expected = gradients_of_a_step(step_config(images=2, batches=1))
    # With two batches, each process meets both images or one of them twice.
    cfgs = [step_config(images=2, batches=1), step_config(images=2, batches=2)]
    mp.start_processes(run_process, (2, cfgs, equal_dataset, tmp_path), nprocs=2, start_method="spawn")
    main, other = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    for steps in zip(main, other):
        assert_same_step(steps[0], expected)
        assert all(steps[1][0][name].equal(gradient) for name, gradient in steps[0][0].items())


# ---- train_net.py


def test_torchrun_trains_and_evaluates(coco_dataset, tmp_path):
    overrides = ["SOLVER.ACCUMULATE", 2]
    result = run(arguments_for(coco_dataset, tmp_path, iterations=2, overrides=overrides), command=TORCHRUN)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("checkpoint:") == 1
    assert any("segm/AP" in line for line in read_metrics(tmp_path))
    assert [line["iteration"] for line in read_metrics(tmp_path) if "total_loss" in line] == [1]
    assert "World size: 2" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "log.txt.rank1").exists()
    assert (tmp_path / "model_final.pth").exists()


def test_wrong_input_under_torchrun_is_one_sentence_of_the_main_process(coco_dataset, tmp_path):
    overrides = ["SOLVER.IMS_PER_BATCH", 3]
    result = run(arguments_for(coco_dataset, tmp_path, overrides=overrides), command=TORCHRUN)
    assert result.returncode != 0
    sentence = "train_net.py: SOLVER.IMS_PER_BATCH is 3, for 2 processes together. Give it a multiple of their number."
    assert [line for line in result.stderr.splitlines() if line.startswith("train_net.py")] == [sentence]
