"""The trainer: accumulation, mixed precision, and the checks of what it is asked for."""

import pytest
import torch
import torch.distributed as dist
from detectron2.config import get_cfg
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mnc_d2 import add_mnc_config
from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import (
    AccumulatingTrainer,
    MNCTrainer,
    autocast_dtype,
    check_device,
    check_solver,
    started_by_torchrun,
)
from mnc_d2.model_zoo import get_config
from mnc_d2.modeling import CausalGradients


class Toy(nn.Module):
    """One weight w; the losses of a batch x are w x and w x once more, the latter through a clipped gradient."""

    def __init__(self, limit=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.gradients = CausalGradients(delta_clip=limit)

    def forward(self, x, loss_scale=1.0):
        self.gradients.loss_scale = loss_scale
        return {"plain": self.weight * x, "clipped": self.gradients.clip_deltas(self.weight, 1) * x}


def toy_trainer(batches, limit=0.0, **kwargs):
    model = Toy(limit)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return AccumulatingTrainer(model, batches, optimizer, takes_loss_scale=True, **kwargs)


def run_steps(trainer, number=1):
    """Run iterations; return what was logged in each."""
    logged = []
    with EventStorage() as storage:
        for trainer.iter in range(number):
            trainer.run_step()
            logged.append({name: value for name, (value, _) in storage.latest().items()})
            storage.step()
    return logged


# ---- accumulation


def test_an_iteration_is_one_step_with_the_mean_gradient_of_its_batches():
    trainer = toy_trainer([1.0, 5.0, 2.0, 4.0], num_batches=2)
    first, second = run_steps(trainer, 2)
    # d(2 w x)/dw = 2 x: -0.5 * 2 * 3 in each of two steps.
    assert trainer.model.weight.item() == 2 - 3 - 3
    assert (first["plain"], first["total_loss"]) == (2 * 3, 2 * 2 * 3)
    assert (second["plain"], second["total_loss"]) == (-1 * 3, -2 * 3)


def test_gradients_are_clipped_for_each_batch_on_its_own():
    trainer = toy_trainer([8.0, 0.5], limit=1.0, num_batches=2)
    run_steps(trainer)
    # The clipped part is 1 and 0.5. Had the losses been divided before, it would be 1 and 0.25.
    assert trainer.model.weight.grad.item() == (8 + 0.5 + 1 + 0.5) / 2


def test_processes_exchange_gradients_once_an_iteration(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, exchanges = DistributedDataParallel(Toy()), []
        model.module.register_forward_hook(lambda *_: exchanges.append(model.require_backward_grad_sync))
        trainer = AccumulatingTrainer(model, [1.0, 2.0, 6.0], torch.optim.SGD(model.parameters(), 0.5), num_batches=3)
        run_steps(trainer)
    finally:
        dist.destroy_process_group()
    assert exchanges == [False, False, True]
    assert model.module.weight.item() == 2 - 3


# ---- steps that are left out


class Fragile(Toy):
    """A toy whose batch is one image with x, which refuses x = None as the RPN does boxes that are not finite."""

    def forward(self, batch, loss_scale=1.0):
        if batch[0]["x"] is None:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        losses = super().forward(batch[0]["x"], loss_scale)
        # Twice sqrt(0) at x = 0: the loss is 0 and its gradient is not a number.
        return {**losses, "root": (self.weight * batch[0]["x"]).sqrt() * 0}


def fragile_trainer(values, max_skipped, **kwargs):
    batches = [[{"file_name": f"{i}.png", "x": x}] for i, x in enumerate(values)]
    model = Fragile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return AccumulatingTrainer(model, batches, optimizer, max_skipped=max_skipped, **kwargs)


@pytest.mark.parametrize(
    ("bad", "what"),
    [(float("nan"), "plain, clipped, root is"), (float("inf"), "plain, "), (0.0, "a gradient is"), (None, "a box of")],
    ids=["NaN", "infinity", "gradient", "boxes"],
)
def test_steps_of_numbers_that_are_not_finite_are_left_out_and_counted(bad, what, caplog):
    trainer = fragile_trainer([1.0, bad, 2.0], max_skipped=1)
    first, second, third = run_steps(trainer, 3)
    assert trainer.model.weight.item() == 2 - 1 - 2
    assert "skipped_steps" not in first and second["skipped_steps"] == third["skipped_steps"] == 1
    assert second["total_loss"] == first["total_loss"] == 4  # that of the step before
    (message,) = (x.getMessage() for x in caplog.records if x.name == "mnc_d2.engine.step")
    assert message.startswith(f"Iteration 1 makes no step (1 of 1): {what}") and "images 1.png." in message


def test_one_step_too_many_that_is_not_finite_ends_the_training():
    trainer = fragile_trainer([0.0, 1.0, None], max_skipped=1)
    with pytest.raises(FloatingPointError, match="a box of the RPN is not finite, with the images 2.png. 1 steps were"):
        run_steps(trainer, 3)
    assert trainer.model.weight.item() == 2 - 1
    with pytest.raises(FloatingPointError, match="Predicted boxes or scores"):
        run_steps(fragile_trainer([None], max_skipped=0))


@pytest.mark.parametrize("bad", [float("nan"), None], ids=["NaN", "boxes"])
def test_a_step_of_several_batches_is_left_out_with_all_of_them(bad, caplog):
    trainer = fragile_trainer([bad, 1.0, 2.0, 4.0], max_skipped=1, num_batches=2)
    run_steps(trainer, 2)
    assert trainer.model.weight.item() == 2 - 3
    assert "0.png, 1.png" in caplog.text


def test_the_number_of_steps_left_out_is_resumed():
    trainer = fragile_trainer([float("nan")], max_skipped=1)
    run_steps(trainer)
    resumed = fragile_trainer([float("nan")], max_skipped=1)
    resumed.load_state_dict(trainer.state_dict())
    with pytest.raises(FloatingPointError):
        run_steps(resumed)


def test_gradients_that_a_loss_scale_made_infinite_do_not_count():
    trainer = fragile_trainer([1e35, 1.0], max_skipped=1, precision=torch.float16)
    trainer.precision = None  # the loss itself is finite
    before = trainer.grad_scaler.get_scale()
    run_steps(trainer)
    assert trainer.num_skipped == 0 and trainer.model.weight.item() == 2
    assert trainer.grad_scaler.get_scale() == before / 2


# ---- mixed precision


def test_gradients_are_clipped_without_the_loss_scale_also_before_a_fused_step():
    trainer = toy_trainer([0.25], precision=torch.float16)
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0, fused=True)
    trainer.optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    run_steps(trainer)
    assert trainer.model.weight.item() == 2.0 - 0.5  # twice the batch: less than the limit


def test_float16_scales_losses_and_limits_and_unscales_gradients():
    trainer = toy_trainer([8.0, 0.5], limit=1.0, num_batches=2, precision=torch.float16)
    scale = trainer.grad_scaler.get_scale()
    run_steps(trainer)
    assert trainer.model.gradients.loss_scale == scale > 1
    assert trainer.model.weight.grad.item() == (8 + 0.5 + 1 + 0.5) / 2
    assert trainer.model.weight.item() == 2 - 0.5 * 5


def test_without_a_loss_scale_the_limits_stay():
    trainer = toy_trainer([1.0], limit=0.25, precision=torch.bfloat16)
    run_steps(trainer)
    assert trainer.model.gradients.loss_scale == 1


def test_the_loss_scale_is_resumed():
    trainer = toy_trainer([1.0], precision=torch.float16)
    run_steps(trainer)
    trainer.grad_scaler.update(4.0)
    resumed = toy_trainer([1.0], precision=torch.float16)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.grad_scaler.get_scale() == 4.0


def test_a_run_without_loss_scale_is_resumed_with_one():
    resumed = toy_trainer([1.0], precision=torch.float16)
    before = resumed.grad_scaler.get_scale()
    resumed.load_state_dict(toy_trainer([1.0]).state_dict())
    assert resumed.grad_scaler.get_scale() == before


@pytest.fixture
def trainer(small_config, coco_dataset, tmp_path, clean_catalogs):
    """A function that returns an MNCTrainer on the drawn images."""

    def make(**overrides):
        register_coco_dataset("drawn", *coco_dataset)
        return MNCTrainer(
            small_config(
                **{
                    "DATALOADER.NUM_WORKERS": 0,
                    "DATASETS.TEST": (),
                    "DATASETS.TRAIN": ("drawn",),
                    "INPUT.CROP.ENABLED": False,
                    "OUTPUT_DIR": str(tmp_path),
                    **overrides,
                }
            )
        )

    return make


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.bfloat16), ("float16", torch.float16)])
def test_a_step_in_mixed_precision(trainer, precision, dtype):
    trainer = trainer(**{"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": precision, "SOLVER.MAX_ITER": 1})
    model, losses, hidden = trainer.model, {}, []
    model.register_forward_hook(lambda _, inputs, output: losses.update(output))
    model.roi_heads.passes[0].mask_head.fc1.register_forward_hook(lambda _, inputs, output: hidden.append(output.dtype))
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    scaler = trainer._trainer.grad_scaler
    if scaler.is_enabled():
        # From the scale that it starts with, a scaler first skips steps, until nothing overflows.
        scaler.load_state_dict({**scaler.state_dict(), "scale": 64.0})
    trainer.train()
    assert set(hidden) == {dtype}
    assert len(losses) == 12
    assert {x.dtype for x in losses.values()} == {torch.float32}
    assert all(x.isfinite() for x in losses.values())
    assert [name for name, x in model.named_parameters() if x.equal(before[name])] == []
    scale = trainer._trainer.grad_scaler.get_scale()
    for module in (model.roi_heads, model.proposal_generator):
        assert module.gradients.loss_scale == scale
    assert (scale > 1) == (dtype == torch.float16)


@pytest.mark.parametrize(
    ("enabled", "precision", "device", "dtype"),
    [
        (False, "float16", "cuda", None),
        (True, "auto", "cuda", torch.float16),
        (True, "auto", "cpu", torch.bfloat16),
        (True, "bfloat16", "cuda", torch.bfloat16),
        (True, "float16", "cpu", torch.float16),
    ],
)
def test_dtype_of_mixed_precision(enabled, precision, device, dtype):
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION, cfg.MODEL.DEVICE = enabled, precision, device
    assert autocast_dtype(cfg) == dtype


# ---- several processes: test_distributed.py; here, what they need


def test_every_parameter_has_a_gradient_without_any_instance(trainer):
    # DistributedDataParallel waits for the gradient of every parameter.
    model = trainer().model
    instances = Instances((96, 96))
    instances.gt_boxes = Boxes(torch.zeros(0, 4))
    instances.gt_classes = torch.zeros(0, dtype=torch.long)
    instances.gt_masks = BitMasks(torch.zeros(0, 96, 96, dtype=torch.bool))
    with EventStorage():
        losses = model([{"image": torch.zeros(3, 96, 96, dtype=torch.uint8), "instances": instances}])
    sum(losses.values()).backward()
    assert [name for name, x in model.named_parameters() if x.grad is None] == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.ACCUMULATE", 0, "SOLVER.ACCUMULATE must be at least 1, got 0"),
        ("SOLVER.AMP.PRECISION", "float8", "SOLVER.AMP.PRECISION must be one of .*'float8'"),
        ("SOLVER.IMS_PER_BATCH", 3, "SOLVER.IMS_PER_BATCH is 3, for 2 processes"),
        ("SOLVER.PATIENCE", 3, "SOLVER.PATIENCE counts evaluations: it needs TEST.EVAL_PERIOD"),
    ],
)
def test_wrong_key_of_the_solver_is_named(key, value, message):
    cfg = get_cfg()
    add_mnc_config(cfg)
    check_solver(cfg, 2)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        check_solver(cfg, 2)


@pytest.mark.parametrize(
    ("gpus", "device", "processes", "message"),
    [
        (0, "cuda", 1, "finds no GPU"),
        (8, "cpu", 2, "hide the GPUs"),
        (2, "cuda", 3, "3 processes need as many GPUs; PyTorch finds 2"),
    ],
)
def test_device_that_the_processes_cannot_have(monkeypatch, gpus, device, processes, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cfg = get_cfg()
    cfg.MODEL.DEVICE = device
    with pytest.raises(ValueError, match=message):
        check_device(cfg, processes)


@pytest.mark.parametrize(
    ("gpus", "device", "processes"), [(0, "cpu", 1), (0, "cpu", 4), (8, "cpu", 1), (8, "cuda", 8), (8, "cuda:1", 1)]
)
def test_device_that_the_processes_can_have(monkeypatch, gpus, device, processes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cfg = get_cfg()
    cfg.MODEL.DEVICE = device
    check_device(cfg, processes)


def test_torchrun_is_told_from_its_environment(monkeypatch):
    assert not started_by_torchrun()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not started_by_torchrun()  # as other launchers have it
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert started_by_torchrun()


def test_the_pretrained_network_has_its_own_learning_rate():
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    cfg.SOLVER.BACKBONE_LR_FACTOR = 0.1
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": nn.Linear(1, 1), "fpn": nn.Linear(1, 1)})})
    optimizer = MNCTrainer.build_optimizer(cfg, model)
    rates = {id(x): group["lr"] for group in optimizer.param_groups for x in group["params"]}
    assert {name: rates[id(x)] / cfg.SOLVER.BASE_LR for name, x in model.named_parameters()} == pytest.approx(
        {
            "backbone.bottom_up.weight": 0.1,
            "backbone.bottom_up.bias": 0.1,
            "backbone.fpn.weight": 1,
            "backbone.fpn.bias": 1,
        }
    )
