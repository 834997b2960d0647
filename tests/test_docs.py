"""Links and commands of the documentation name what there is."""

import re
import shlex
from pathlib import Path

import pytest

from mnc_d2.cli import build_parser
from mnc_d2.engine import argument_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(ROOT / x for x in ("datasets/README.md", "tests/benchmarks/README.md")),
    ]
)
IDS = [str(x.relative_to(ROOT)) for x in PAGES]


def commands_of(page):
    """The commands in blocks of shell, each as a list of words, without comments."""
    for block in re.findall(r"```(?:sh)?\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                yield shlex.split(line, comments=True)
            except ValueError:
                continue  # code of another language


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_configs_exist(page):
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"(?:configs/)?((?:quickstart|PascalVOC-\w+|COCO-\w+)/\w+\.yaml)", text)
    # Those of Detectron2's own zoo, and of Base configs by link, are not ours.
    names = [x for x in names if "mask_rcnn_R_50_C4_1x" not in x]
    assert [x for x in names if not (ROOT / "configs" / x).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_name_scripts_and_options_that_exist(page):
    subcommands = build_parser()._subparsers._group_actions[0].choices
    for words in commands_of(page):
        scripts = [x for x in words if re.fullmatch(r"(?:train_net|(?:tests|datasets|docs|requirements)/.*)\.py", x)]
        assert all((ROOT / x).is_file() for x in scripts), words
        options = {x.partition("=")[0] for x in words if re.match(r"--\w", x)}
        if words[:1] == ["mnc"]:
            assert options <= options_of(subcommands[words[1]]), words
        elif words[:2] == ["python", "train_net.py"]:
            assert options <= options_of(argument_parser()), words
        elif words[:1] == ["make"]:
            targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), flags=re.M)
            assert words[1] in targets, words
