"""Install Detectron2 into the running Python's environment, unless it is there already.

Detectron2 is not on the package index under its own name. ``requirements/detectron2.txt`` pins, with its checksum, a
package that is official Detectron2 main of April 2024 (commit a59f0563). Its only wheel is tagged for Python 3.10
because it carries an extension module compiled for that version; the Python part runs on any Python from 3.9, and
nothing in mnc_d2 needs the extension. This script therefore unpacks the wheel, removes what does not belong in a
version-independent install (the extension module, a stray top-level ``tools`` package, two requirements that do not
hold: ``numpy<2`` and the formatter ``black``), and moves the rest into place. An importable detectron2 is never
touched, so a build from source with compiled operators stays what it is.

Run it as ``python requirements/install_detectron2.py``; it needs pip 23 or newer.
"""

import csv
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PIN = Path(__file__).with_name("detectron2.txt")
DROPPED_REQUIREMENTS = ("Requires-Dist: numpy<2", "Requires-Dist: black")


def download(target: Path) -> None:
    """Let pip fetch, verify and unpack the pinned wheel into the directory ``target``."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp"]
    command += ["--target", str(target), "--require-hashes", "-r", str(PIN)]
    subprocess.run(command, check=True)


def make_version_independent(root: Path) -> Path:
    """Remove from the unpacked wheel what ties it to Python 3.10; return its .dist-info directory."""
    shutil.rmtree(root / "tools")
    for extension in (root / "detectron2").glob("_C*.so"):
        extension.unlink()
    (dist_info,) = root.glob("*.dist-info")

    metadata = dist_info / "METADATA"
    lines = metadata.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.strip() not in DROPPED_REQUIREMENTS]
    metadata.write_text("\n".join(kept) + "\n", encoding="utf-8")

    # What is left is pure Python, for any version.
    wheel = dist_info / "WHEEL"
    replaced = {"Tag": "Tag: py3-none-any", "Root-Is-Purelib": "Root-Is-Purelib: true"}
    lines = wheel.read_text(encoding="utf-8").splitlines()
    wheel.write_text("".join(replaced.get(x.split(":")[0], x) + "\n" for x in lines), encoding="utf-8")

    # RECORD lists what `pip uninstall` removes: only files that are there, without stale checksums of the edited ones.
    record = dist_info / "RECORD"
    with record.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if (root / row[0]).exists()]
    edited = {metadata, wheel}
    with record.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([row[0], "", ""] if root / row[0] in edited else row for row in rows)
    return dist_info


def main() -> None:
    if importlib.util.find_spec("detectron2") is not None:
        print("detectron2 is already installed; leaving it as it is.")
        return
    purelib = Path(sysconfig.get_paths()["purelib"])
    # Staged beside the destination: the moves are renames within one file system.
    with tempfile.TemporaryDirectory(dir=purelib, prefix=".detectron2-") as staging:
        root = Path(staging)
        download(root)
        dist_info = make_version_independent(root)
        shutil.move(str(dist_info), str(purelib / dist_info.name))
        shutil.move(str(root / "detectron2"), str(purelib / "detectron2"))
    print(f"Installed detectron2 into {purelib}")


if __name__ == "__main__":
    main()
