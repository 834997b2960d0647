"""Installing and importing: what happens without Detectron2, and how it is installed."""

import csv
import subprocess
import sys

import pytest
from programs import ROOT, SCRIPT, load_script, parse


def test_import_without_detectron2_says_what_to_run():
    # -S leaves out site-packages, and so Detectron2.
    command = [sys.executable, "-S", "-c", "import mnc_d2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError") and "make install" in message and "pip install" in message


def test_train_net_ends_with_one_sentence_and_no_warning():
    # The other program is started by tests/serve/test_command.py.
    command = [sys.executable, SCRIPT, "--config-file", "none.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("train_net.py: There is no config file")


def test_train_net_has_a_help(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr().out.startswith("usage:")


def test_unpacked_wheel_keeps_nothing_that_is_tied_to_python_3_10(tmp_path):
    files = {
        "detectron2/__init__.py": "",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "",
        "tools/train_net.py": "",
        "sal_detectron2-0.7.2.dist-info/METADATA": "Name: x\nRequires-Dist: numpy<2\nRequires-Dist: tabulate\n"
        "Requires-Dist: black\n",
        "sal_detectron2-0.7.2.dist-info/WHEEL": "Root-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    record = tmp_path / "sal_detectron2-0.7.2.dist-info" / "RECORD"
    record.write_text("".join(f"{name},sha256=0,1\n" for name in files))

    installer = load_script(ROOT / "requirements" / "install_detectron2.py")
    dist_info = installer.make_version_independent(tmp_path)

    assert dist_info == record.parent
    assert not (tmp_path / "tools").exists()
    assert [path.name for path in (tmp_path / "detectron2").iterdir()] == ["__init__.py"]
    assert (dist_info / "METADATA").read_text() == "Name: x\nRequires-Dist: tabulate\n"
    assert (dist_info / "WHEEL").read_text() == "Root-Is-Purelib: true\nTag: py3-none-any\n"
    with record.open(newline="") as file:
        rows = list(csv.reader(file))
    # Files that were edited have lost their checksum, those that were removed their row.
    edited = {f"{dist_info.name}/METADATA", f"{dist_info.name}/WHEEL"}
    assert rows == [[n, "", ""] if n in edited else [n, "sha256=0", "1"] for n in files if (tmp_path / n).exists()]
