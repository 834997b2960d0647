"""The documentation names what there is: links, commands and their options, configs, keys, files, functions."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from mnc_d2.cli import build_parser
from mnc_d2.engine import argument_parser
from mnc_d2.model_zoo import load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(ROOT / x for x in ("datasets/README.md", "tests/benchmarks/README.md")),
    ]
)
IDS = [str(x.relative_to(ROOT)) for x in PAGES]


def blocks_of(page, language):
    """The code blocks of a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [code for name, code in blocks if name == language]


def commands_of(page):
    """The commands in blocks of shell, each as a list of words, without comments."""
    for block in [*blocks_of(page, "sh"), *blocks_of(page, "")]:
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue  # code of another language
            if words:
                yield words


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


def inline_code(page):
    """What stands between single backticks in the text."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return [re.sub(r"\s+", " ", x) for x in re.findall(r"`([^`]+)`", text)]


def leaves(node, prefix=""):
    """Keys and values of a config, the keys with dots."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    assert missing_links(page.read_text(encoding="utf-8"), page.parent) == []


def test_links_of_the_notebook_lead_to_files():
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert missing_links(text, ROOT / "docs") == []


def missing_links(text, folder):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    return [x for x in links if "://" not in x and not (folder / x).exists()]


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
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for words in [*commands_of(page), *(x.split() for x in inline_code(page))]:
        scripts = [x for x in words if re.fullmatch(r"(?:train_net|(?:tests|datasets|docs|requirements)/.*)\.py", x)]
        assert all((ROOT / x).is_file() for x in scripts), words
        options = {x.partition("=")[0] for x in words if re.match(r"--\w", x)}
        if words[:1] == ["mnc"] and len(words) > 1 or words[:3] == ["python", "-m", "mnc_d2"]:
            command = words[1] if words[0] == "mnc" else words[3]
            assert command in subcommands, words
            assert options <= options_of(subcommands[command]), words
        elif words[:2] == ["python", "train_net.py"]:
            assert options <= options_of(argument_parser()), words
        elif "python" in words[0] and scripts and len(words) > 1:
            source = (ROOT / scripts[0]).read_text(encoding="utf-8")
            known = options_of(argument_parser()) if "argument_parser()" in source else set()
            assert {x for x in options - known if f'"{x}"' not in source} <= {"--help"}, words
        elif words[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets, words


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_keys_are_in_the_config(page):
    known = {"OMP_NUM_THREADS"}
    for key, _ in leaves(load_config("")):
        words = key.split(".")
        for i in range(len(words)):
            known |= {".".join(words[: i + 1]), ".".join(words[i:])}  # a group of keys; a key without its group
    text = page.read_text(encoding="utf-8")
    dotted = re.findall(r"\b(?:MODEL|SOLVER|TEST|INPUT|DATASETS|DATALOADER)(?:\.[A-Z][A-Z0-9_]*)+\b", text)
    alone = [x for code in inline_code(page) for x in re.findall(r"^[A-Z]+(?:_[A-Z]+)+(?= |$)", code)]
    alone = [x for x in alone if not x.endswith("_REGISTRY")]
    assert [x for x in dotted + alone if x not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_imports_in_code_blocks_work(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "mnc_d2" / "export")  # the client lies beside a file that was exported
    for block in blocks_of(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [x.name for x in node.names if not hasattr(module, x.name)] == [], node.module


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_in_the_text_exist(page):
    names = [x.partition("::")[0] for code in inline_code(page) for x in code.split()]
    paths = [x for x in names if re.fullmatch(r"(?:mnc_d2|tests|configs|requirements|docs)/[\w/.-]+", x)]
    assert [x for x in paths if not (ROOT / x).exists()] == []


def test_pages_that_the_code_names_exist():
    files = [x for folder in ("mnc_d2", "configs", "tests") for x in (ROOT / folder).rglob("*")]
    code = [x for x in files if x.suffix in (".py", ".yaml", ".html")]
    for path in [*code, ROOT / "setup.py", ROOT / "train_net.py"]:
        for page in re.findall(r"(?<![\w/])(?:docs|datasets)/[\w-]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{path}: {page}"


def test_architecture_names_files_and_functions_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = "\n".join(x.read_text(encoding="utf-8") for x in (ROOT / "mnc_d2").rglob("*.py"))
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|([^|]+)\|$", text.partition("## Rooms")[0], flags=re.M)
    assert len(rows) > 5
    folder = ROOT / "mnc_d2"
    for files, functions in rows:
        for path in re.findall(r"`([^`]+)`", files):
            places = (folder, folder / "modeling" / "roi_heads")
            assert any((place / path).exists() for place in places), path
        for name in re.findall(r"`([^`]+)`", functions):
            for part in name.split("."):
                assert re.search(rf"(?:def|class) {part}\b", source), name


def test_the_table_of_defaults_is_that_of_the_configs():
    ours = load_config("Base-MNC.yaml")
    papers = load_config("Base-MNC.yaml")
    papers.merge_from_file(str(ROOT / "configs" / "Base-paper.yaml"))
    papers = dict(leaves(papers))
    expected = {key: (papers[key], value) for key, value in leaves(ours) if papers[key] != value}
    text = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_.]+)` \| `(.+?)` \| `(.+?)` \|", text, flags=re.M)
    assert {key: (yaml.safe_load(a), yaml.safe_load(b)) for key, a, b in rows} == expected
