"""Bad inputs of all kinds, and what this project makes of them: a table.

    python tests/bad_inputs.py                      # more than a thousand cases
    python tests/bad_inputs.py --family configs     # of one kind
    python tests/bad_inputs.py --verbose            # with the sentence of each

The exit code is 0 if each is answered by a sentence that names what is wrong, or handled rightly. Cases run in one
process after another: one that a case ends or that hangs in it counts for that case, and the next takes over.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from robustness import arguments, arrays, checkpoints, coco, configs, images
from robustness.common import MARK, Case
from tabulate import tabulate

FAMILIES = [coco, configs, images, checkpoints, arrays, arguments]
# The first two are as they should be.
OUTCOMES = ("sentence", "result", "vague", "trace", "silent", "code", "crash", "hang")
PATIENCE = 120  # seconds, many times what a case takes


def make_cases(seed: int) -> list[Case]:
    """Return all cases, the same for the same seed."""
    return [case for family in FAMILIES for case in family.make_cases(seed)]


def run_case(case: Case) -> tuple[str, str]:
    """Run a case in a folder of its own; return the outcome and what was said."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        errors = io.StringIO()
        os.chdir(folder)
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            outcome = _outcome(case, folder, errors)
        return ("code", outcome[1]) if (folder / MARK).exists() else outcome


def _outcome(case: Case, folder: Path, errors: io.StringIO) -> tuple[str, str]:
    try:
        wrong = case.run(folder)
    except (ValueError, OSError) as error:  # what the programs turn into a sentence
        said = str(error)
    except SystemExit as error:
        said = (
            error.code
            if isinstance(error.code, str)
            else errors.getvalue().split(f"{os.path.basename(sys.argv[0])}: ")[-1]
        )
    except BaseException:
        return "trace", traceback.format_exc()
    else:
        if case.is_bad and wrong is None:
            wrong = "it was taken as if nothing were wrong"
        return ("result", "") if wrong is None else ("silent", wrong)
    return ("sentence" if any(x in said for x in case.names) else "vague"), said


def run_cases(cases: list[Case], patience: float = PATIENCE) -> Iterator[tuple[str, str]]:
    """Run cases in worker processes; yield the outcome of each and what was said."""
    context = multiprocessing.get_context("fork")  # with everything imported
    worker = None
    try:
        for index in range(len(cases)):
            if worker is None:
                here, there = context.Pipe()
                worker = context.Process(target=_work, args=(cases, there), daemon=True)
                worker.start()
                there.close()
            here.send(index)
            try:
                outcome = here.recv() if here.poll(patience) else ("hang", f"more than {patience} s")
            except EOFError:
                worker.join()
                outcome = "crash", f"exit code {worker.exitcode}"
            if outcome[0] in ("crash", "hang"):
                worker.kill()
                worker = None
            yield outcome
    finally:  # also where the outcomes of the rest are not asked for
        if worker is not None:
            worker.kill()


def _work(cases: list[Case], connection) -> None:
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # of libraries in C
        os.dup2(null, stream)
    while True:
        connection.send(run_case(cases[connection.recv()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: bits that are flipped, places of cuts")
    parser.add_argument("--family", choices=[x.__name__.split(".")[-1] for x in FAMILIES])
    parser.add_argument("--verbose", action="store_true", help="print each case and what was said")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of cases have half characters
    cases = [case for case in make_cases(args.seed) if args.family in (None, case.family)]
    counts, bad = {}, []
    for case, (outcome, said) in zip(cases, run_cases(cases)):
        counts.setdefault(case.family, Counter())[outcome] += 1
        if args.verbose:
            print(f"{case.family}: {case.name}: {outcome}: {said}", flush=True)
        if outcome not in OUTCOMES[:2]:
            bad.append(f"{case.family}: {case.name}: {outcome}\n{said}")
    counts["all"] = sum(counts.values(), Counter())
    rows = [[family, count.total(), *(count[x] for x in OUTCOMES)] for family, count in counts.items()]
    print("\n\n".join(bad))
    print(tabulate(rows, headers=["family", "cases", *OUTCOMES], tablefmt="pipe"))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
