"""Loading weights: torchvision's VGG-16, one source for several heads, files that are refused, what is logged."""

import logging
import pickle
from collections import OrderedDict

import pytest
import torch
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from iopath.common.file_io import HTTPURLHandler
from robustness.common import Code
from torch import nn
from torchvision.models import vgg, vgg13, vgg16, vgg16_bn

from mnc_d2.checkpoint import MNCCheckpointer
from mnc_d2.checkpoint.conversion import convert_torchvision_vgg16, copy_to_all
from mnc_d2.data import register_coco_dataset
from mnc_d2.engine import MNCTrainer
from mnc_d2.experiments import UnsharedBackbones
from mnc_d2.modeling import VGG16, CascadePass, MaskedFeatureClassifier

FC_DIM = 6
HIDDEN = (FC_DIM, 512 * 7 * 7)


class Model(nn.Module):
    """Modules under the names of a whole model: of one with a box head, or of a cascade with so many passes."""

    def __init__(self, backbone=None, box_head=None, mask_head=None, paths=()):
        super().__init__()
        self.backbone = backbone or nn.Module()
        self.roi_heads = nn.Module()
        if box_head is not None:
            self.roi_heads.box_head = box_head
        self.roi_heads.passes = nn.ModuleList(
            CascadePass(mask_head, MaskedFeatureClassifier(*pair, nn.Module(), resolution=7)) for pair in paths
        )

    @property
    def path_heads(self):
        """The heads of both paths in all passes, the mask path first."""
        classifiers = [x.classifier for x in self.roi_heads.passes]
        return [head for x in classifiers for head in (x.mask_path_head, x.box_path_head)]


def fc_head(fc_dim=FC_DIM):
    return FastRCNNConvFCHead(ShapeSpec(channels=512, height=7, width=7), conv_dims=[], fc_dims=[fc_dim, fc_dim])


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    """A torchvision VGG-16 with hidden layers of 6 units and 3 classes: (file, its convolutions, its state dict)."""
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    state_dict = {f"features.{name}": x for name, x in features.state_dict().items()}
    for i, shape in ((0, HIDDEN), (3, (FC_DIM, FC_DIM)), (6, (3, FC_DIM))):
        state_dict[f"classifier.{i}.weight"] = torch.randn(shape)
        state_dict[f"classifier.{i}.bias"] = torch.randn(shape[0])
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state_dict, path)
    return path, features, state_dict


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """A function that returns what the checkpointer has logged, also where Detectron2 has set up its own handlers."""
    logger = logging.getLogger("fvcore.common.checkpoint")
    caplog.set_level(logging.INFO, logger=logger.name)
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    logger.removeHandler(caplog.handler)


def load(model, path):
    MNCCheckpointer(model).load(str(path))
    return model


# ---- VGG-16 of torchvision


def test_vgg16_computes_what_torchvisions_does(vgg16_file):
    path, features, _ = vgg16_file
    model = load(Model(VGG16(["conv3", "conv5"])), path)
    images = torch.randn(2, 3, 50, 67)
    with torch.no_grad():
        outputs = model.backbone(images)
        # Up to the ReLUs of conv3_3 and conv5_3; the last layer is the pooling after it.
        torch.testing.assert_close(outputs["conv3"], features[:16](images))
        torch.testing.assert_close(outputs["conv5"], features[:30](images))
    assert outputs["conv5"].abs().sum() > 0


def test_fc6_and_fc7_start_both_paths(vgg16_file):
    path, _, state_dict = vgg16_file
    model = load(Model(paths=[(fc_head(), fc_head())]), path)
    x = torch.randn(2, 512, 7, 7)
    hidden = (x.flatten(1) @ state_dict["classifier.0.weight"].T + state_dict["classifier.0.bias"]).relu()
    expected = (hidden @ state_dict["classifier.3.weight"].T + state_dict["classifier.3.bias"]).relu()
    assert 0 < (expected > 0).float().mean()
    for head in model.path_heads:
        torch.testing.assert_close(head(x), expected)


def test_backbones_that_share_nothing_all_start_from_it(vgg16_file):
    path, features, _ = vgg16_file
    model = load(Model(UnsharedBackbones({"boxes": VGG16(), "masks": VGG16()})), path)
    for backbone in model.backbone.backbones.values():
        assert torch.equal(backbone.conv1_1.weight, features[0].weight)
        assert torch.equal(backbone.conv5_3.bias, features[28].bias)


def test_fc6_and_fc7_start_the_box_head_of_a_faster_rcnn(vgg16_file):
    path, _, state_dict = vgg16_file
    model = load(Model(box_head=fc_head()), path)
    assert torch.equal(model.roi_heads.box_head.fc1.weight, state_dict["classifier.0.weight"])
    assert torch.equal(model.roi_heads.box_head.fc2.bias, state_dict["classifier.3.bias"])


def test_fc6_and_fc7_start_every_pass_that_has_weights_of_its_own(vgg16_file):
    path, _, state_dict = vgg16_file
    model = load(Model(paths=[(fc_head(), fc_head()), (fc_head(), fc_head())]), path)
    assert len(model.path_heads) == 4
    for head in model.path_heads:
        assert torch.equal(head.fc1.weight, state_dict["classifier.0.weight"])
        assert torch.equal(head.fc2.weight, state_dict["classifier.3.weight"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"model": x},
        lambda x: {"state_dict": x, "epoch": 3, "arch": "vgg16"},
        lambda x: {"state_dict": {k.replace("features.", "features.module."): v for k, v in x.items()}},
        lambda x: {f"module.{k}": v for k, v in x.items()},
        OrderedDict,
    ],
    ids=["model", "state_dict", "DataParallel inside", "DataParallel outside", "ordered"],
)
def test_every_layout_of_the_file_is_read(tmp_path, vgg16_file, wrap):
    # One number for each tensor, which keeps the file small.
    state_dict = {name: torch.tensor([float(i)]).expand(x.shape) for i, (name, x) in enumerate(vgg16_file[2].items())}
    torch.save(wrap(state_dict), tmp_path / "vgg16.pth")
    model = load(Model(VGG16(), paths=[(fc_head(), nn.Module())]), tmp_path / "vgg16.pth")
    assert torch.equal(model.backbone.conv1_1.weight, state_dict["features.0.weight"])
    assert torch.equal(model.backbone.conv5_3.bias, state_dict["features.28.bias"])
    assert torch.equal(model.path_heads[0].fc2.weight, state_dict["classifier.3.weight"])


def test_the_names_are_those_of_torchvisions_own_vgg16():
    with torch.device("meta"):
        state_dict = vgg16(weights=None).state_dict()
        model = Model(VGG16(), paths=[(fc_head(4096), fc_head(4096))])
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    converted = {name: x.shape for name, x in convert_torchvision_vgg16(state_dict, shapes).items()}
    unused = {"classifier.6.weight", "classifier.6.bias"}
    assert set(converted) - set(shapes) == unused
    assert {name: shape for name, shape in converted.items() if name not in unused} == shapes


@pytest.mark.parametrize("network", [vgg13, vgg16_bn])
def test_other_vggs_are_refused(network):
    with torch.device("meta"):
        state_dict = network(weights=None).state_dict()
    with pytest.raises(ValueError, match=r"not torchvision's vgg16, .* features\.0, features\."):
        convert_torchvision_vgg16(state_dict, [])


def test_shapes_that_do_not_fit_are_reported_and_the_rest_is_loaded(vgg16_file, log):
    path, _, state_dict = vgg16_file
    model = load(Model(paths=[(fc_head(FC_DIM + 1), fc_head())]), path)
    name = "roi_heads.passes.0.classifier.mask_path_head.fc1.weight"
    assert f"'{name}' to the model due to incompatible shapes: {HIDDEN}" in log()
    assert torch.equal(model.path_heads[1].fc1.weight, state_dict["classifier.0.weight"])


# ---- names of earlier versions


@pytest.mark.parametrize("separate", [False, True], ids=["shared by the passes", "one for each pass"])
def test_a_checkpoint_from_before_the_list_of_passes_loads(tmp_path, separate):
    def make_heads(seed):
        torch.manual_seed(seed)
        return {"mask_path_head": fc_head(), "box_path_head": fc_head(), "mask_head": nn.Sequential(nn.Linear(2, 2))}

    old = [make_heads(seed) for seed in range(2 if separate else 1)]
    saved = nn.ModuleDict({name: nn.ModuleList(x[name] for x in old) if separate else old[0][name] for name in old[0]})
    torch.save({"model": {f"roi_heads.{k}": v for k, v in saved.state_dict().items()}}, tmp_path / "old.pth")
    new = [make_heads(seed=7) for _ in old]
    passes = [
        CascadePass(
            x["mask_head"], MaskedFeatureClassifier(x["mask_path_head"], x["box_path_head"], nn.Module(), resolution=7)
        )
        for x in new
    ]
    model = Model()
    model.roi_heads.passes = nn.ModuleList(passes)
    load(model, tmp_path / "old.pth")
    for before, after in zip(old, new):
        for name in before:
            assert all(map(torch.equal, before[name].state_dict().values(), after[name].state_dict().values()))


# ---- what is logged


def test_the_log_tells_what_was_loaded_what_not_and_what_was_not_used(vgg16_file, log):
    model = Model(VGG16(), mask_head=nn.Sequential(nn.Linear(2, 2)), paths=[(fc_head(), fc_head())])
    load(model, vgg16_file[0])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in log().splitlines() if line.startswith("|")]
    assert ["backbone", "26 of 26"] in rows
    assert ["roi_heads.passes.0.classifier.mask_path_head", "4 of 4"] in rows
    assert ["roi_heads.passes.0.classifier.box_path_head", "4 of 4"] in rows
    assert ["roi_heads.passes.0.mask_head", "0 of 2"] in rows
    assert "Loaded 34 of the model's 36 tensors; 2 of the checkpoint's are not used." in log()
    assert "roi_heads.passes.0.mask_head.0.{bias, weight}" in log()  # named as not found in the checkpoint
    assert "classifier.6.{bias, weight}" in log()  # named as not used
    assert len(log().splitlines()) < 30


def test_a_checkpoint_that_fits_nothing_is_an_error(tmp_path):
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth has nothing for this model"):
        load(Model(box_head=fc_head()), tmp_path / "other.pth")


# ---- one source for several heads


class ResNetPart(nn.Module):
    """Stages of one block with one convolution, named as in Detectron2's ResNet."""

    def __init__(self, *stages):
        super().__init__()
        for stage in stages:
            conv = nn.Conv2d(2, 2, 1, bias=False)
            conv.norm = nn.BatchNorm2d(2)
            self.add_module(stage, nn.Sequential(nn.ModuleDict({"conv1": conv})))


def tensors(stage):
    (block,) = stage
    return [block["conv1"].weight, block["conv1"].norm.weight, block["conv1"].norm.bias]


def res5_file(path, caffe2):
    """Write an ImageNet ResNet's res4 and res5, with Caffe2's names or Detectron2's; return three tensors of each."""
    rng = torch.Generator().manual_seed(0)
    arrays = {}
    for stage in ("res4", "res5"):
        names = ("branch2a_w", "branch2a_bn_s", "branch2a_bn_b") if caffe2 else ("weight", "norm.weight", "norm.bias")
        prefix = f"{stage}_0_" if caffe2 else f"{stage}.0.conv1."
        for name, shape in zip(names, ((2, 2, 1, 1), (2,), (2,))):
            arrays[prefix + name] = torch.randn(shape, generator=rng).numpy()
    data = arrays if caffe2 else {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(data))
    return [torch.from_numpy(x) for x in arrays.values()]


@pytest.mark.parametrize("caffe2", [True, False], ids=["Caffe2's names", "Detectron2's names"])
@pytest.mark.parametrize("passes", [1, 2], ids=["shared by the passes", "one for each pass"])
def test_res5_starts_both_paths(tmp_path, caffe2, passes):
    expected = res5_file(tmp_path / "R-50.pkl", caffe2)
    paths = [(ResNetPart("res5"), ResNetPart("res5")) for _ in range(passes)]
    model = load(Model(ResNetPart("res4"), paths=paths), tmp_path / "R-50.pkl")
    assert all(map(torch.equal, tensors(model.backbone.res4), expected[:3]))
    for head in model.path_heads:
        assert all(map(torch.equal, tensors(head.res5), expected[3:]))


def test_res5_that_the_backbone_has_too_goes_to_all_three(tmp_path):
    expected = res5_file(tmp_path / "R-50.pkl", caffe2=False)
    model = Model(ResNetPart("res4", "res5"), paths=[(ResNetPart("res5"), ResNetPart("res5"))])
    load(model, tmp_path / "R-50.pkl")
    for part in (model.backbone, *model.path_heads):
        assert all(map(torch.equal, tensors(part.res5), expected[3:]))


def test_an_entry_of_no_head_keeps_its_name():
    state_dict = {"res4.weight": torch.zeros(1), "nowhere": torch.zeros(1)}
    assert copy_to_all(state_dict, ["backbone.res4.weight", "roi_heads.box_head.fc1.weight"]) == state_dict


# ---- files


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model"])
def test_a_file_that_would_run_code_is_refused_by_name(tmp_path, name):
    torch.save({"model": {"weight": torch.zeros(1)}, "extra": Code(tmp_path / "made")}, tmp_path / name)
    with pytest.raises(ValueError, match=r"could run any code.*torch\.save\(model\.state_dict\(\), path\)") as error:
        load(nn.Linear(1, 1), tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert not (tmp_path / "made").exists()


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "half.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"half\.pth cannot be loaded: it is damaged"):
        load(nn.Linear(1, 1), path)


def test_a_file_without_a_state_dict_is_named(tmp_path):
    torch.save(torch.zeros(1), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match=r"tensor\.pth holds a Tensor where a state dict should be"):
        load(nn.Linear(1, 1), tmp_path / "tensor.pth")


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.zeros(1, 1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(1000)) + 500] ^= 1
    path.write_bytes(content)
    assert torch.load(path)["weight"].abs().sum() > 0  # PyTorch does not mind
    with pytest.raises(ValueError, match=r"model\.pth is damaged: .*check sum"):
        load(nn.Linear(1000, 1, bias=False), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": [1]}, "a list where a state dict should be"),
        ({"weight": torch.zeros(1), "epoch": 3}, "a int 'epoch' among the weights"),
        ({"weight": torch.full((1, 1), float("nan")), "bias": torch.zeros(1)}, "not finite: weight"),
    ],
    ids=["no state dict", "a number", "NaN"],
)
def test_what_is_no_model_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "wrong.pth")
    checkpointer = MNCCheckpointer(nn.Linear(1, 1))
    for _ in range(2):  # an error leaves the checkpointer as it was
        with pytest.raises(ValueError, match=rf"wrong\.pth .*{message}"):
            checkpointer.load(str(tmp_path / "wrong.pth"))


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match=r"empty\.pth is empty"):
        load(nn.Linear(1, 1), tmp_path / "empty.pth")


def test_torchvision_weights_have_a_name(monkeypatch, vgg16_file):
    path, _, state_dict = vgg16_file
    asked = []

    def download(self, url, *args, **kwargs):
        asked.append(url)
        return str(path)

    monkeypatch.setattr(HTTPURLHandler, "_get_local_path", download)
    model = load(Model(box_head=fc_head()), "torchvision://vgg16")
    assert asked == ["https://download.pytorch.org/models/vgg16-397923af.pth"]
    assert torch.equal(model.roi_heads.box_head.fc1.weight, state_dict["classifier.0.weight"])


@pytest.mark.parametrize("name", ["vgg61", "fasterrcnn_resnet50_fpn"], ids=["no such model", "not from ImageNet"])
def test_a_name_without_torchvision_weights_is_an_error(name):
    with pytest.raises(ValueError, match=rf"^torchvision://{name}: torchvision publishes no ImageNet weights"):
        load(nn.Linear(1, 1), f"torchvision://{name}")


# ---- resuming


def training(folder):
    """A model, its optimiser, its schedule, and their checkpointer."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    schedule = WarmupParamScheduler(MultiStepParamScheduler([1, 0.1], milestones=[3, 9]), 0.1, 0.2)
    scheduler = LRMultiplier(optimizer, schedule, max_iter=9)
    checkpointer = MNCCheckpointer(model, str(folder), optimizer=optimizer, scheduler=scheduler)
    return model, optimizer, scheduler, checkpointer


def test_a_training_resumes_from_its_own_checkpoint(tmp_path, log):
    torch.manual_seed(0)
    model, optimizer, scheduler, checkpointer = training(tmp_path)
    for _ in range(5):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
    checkpointer.save("model_0000004", iteration=4)

    resumed, resumed_optimizer, resumed_scheduler, checkpointer = training(tmp_path)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 4
    assert torch.equal(resumed.weight, model.weight)
    momentum = resumed_optimizer.state[resumed.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[model.weight]["momentum_buffer"])
    assert resumed_scheduler.last_epoch == scheduler.last_epoch == 5
    assert resumed_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert "Loaded 2 of the model's 2 tensors; 0 of the checkpoint's are not used." in log()


def test_the_trainer_saves_and_loads_with_this_checkpointer(small_config, coco_dataset, clean_catalogs, tmp_path):
    register_coco_dataset("drawn", *map(str, coco_dataset))
    cfg = small_config(
        **{"DATASETS.TRAIN": ("drawn",), "OUTPUT_DIR": str(tmp_path), "DATALOADER.NUM_WORKERS": 0, "SOLVER.MAX_ITER": 9}
    )
    trainer = MNCTrainer(cfg)
    assert isinstance(trainer.checkpointer, MNCCheckpointer)
    (hook,) = [x for x in trainer._hooks if isinstance(x, PeriodicCheckpointer)]
    assert hook.checkpointer is trainer.checkpointer

    trainer.iter = 3
    trainer.checkpointer.save("model_0000003")
    resumed = MNCTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    for name, x in resumed.model.state_dict().items():
        assert torch.equal(x, trainer.model.state_dict()[name]), name
