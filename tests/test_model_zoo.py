"""Configs by name."""

from pathlib import Path

import pytest

from mnc_d2.model_zoo import get_config, get_config_file

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
    assert cfg.MODEL.RESNETS.DEPTH == 18  # from Base-R-18-FPN.yaml
    cfg.SOLVER.MAX_ITER = 1
