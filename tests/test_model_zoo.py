"""Configs by name."""

from pathlib import Path

import pytest
import yaml

from mnc_d2.model_zoo import get_config, get_config_file, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_found_by_its_path_under_configs(name):
    assert Path(get_config_file(name)).samefile(CONFIGS / name)


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(FileNotFoundError) as error:
        get_config_file("quickstart/none.yaml")
    assert "'quickstart/none.yaml'" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)


def test_a_config_has_the_keys_of_its_bases_and_can_be_changed():
    cfg = get_config("quickstart/mnc_R_18_FPN.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "MultitaskNetworkCascade"  # from Base-MNC.yaml
    assert cfg.MODEL.RESNETS.DEPTH == 18  # from Base-R-18.yaml
    cfg.SOLVER.MAX_ITER = 1


def flatten(node, prefix=""):
    """The keys of a config and their values."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def bases_of(path):
    """The files that a config inherits from directly."""
    bases = yaml.safe_load(path.read_text()).get("_BASE_", [])
    return [path.parent / x for x in ([bases] if isinstance(bases, str) else bases)]


def depth_of(path):
    return 1 + max(map(depth_of, bases_of(path)), default=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_config_is_more_than_three_files_deep(name):
    assert depth_of(CONFIGS / name) <= 3


@pytest.mark.parametrize("name", [x for x in NAMES if "efficientnet" in x and "Base" not in x])
def test_no_model_inherits_another_backbone(name):
    assert get_config(name).MODEL.RESNETS == load_config("").MODEL.RESNETS


@pytest.mark.parametrize(("name", "below"), [("Base-MNC.yaml", ""), ("Base-paper.yaml", "Base-MNC.yaml")])
def test_the_papers_values_stand_once(name, below):
    defaults, merged = dict(flatten(load_config(below))), dict(flatten(load_config(name)))
    own = dict(flatten(yaml.safe_load((CONFIGS / name).read_text()))).keys() - {"VERSION"}
    assert [key for key in own if merged[key] == defaults[key]] == []
