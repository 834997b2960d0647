"""A few of the bad inputs of tests/bad_inputs.py, and that their outcomes are told apart."""

import os
import signal

import bad_inputs
import pytest
from robustness.common import MARK, Case


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (lambda _: fail(ValueError("x.json is wrong")), "sentence"),
        (lambda _: fail(SystemExit("x.json is wrong")), "sentence"),
        (lambda _: fail(ValueError("wrong")), "vague"),
        (lambda _: fail(KeyError("x.json")), "trace"),
        (lambda _: None, "silent"),
        (lambda folder: (folder / MARK).mkdir(), "code"),
        (lambda _: os.kill(os.getpid(), signal.SIGKILL), "crash"),
        (lambda _: signal.pause(), "hang"),
        (lambda _: "it is wrong", "silent"),
    ],
)
def test_outcomes_are_told_apart(run, outcome):
    right = Case("test", "right", lambda _: None, ("x.json",), is_bad=False)
    case = Case("test", "bad", run, ("x.json",))
    outcomes = [x for x, _ in bad_inputs.run_cases([right, case, right], patience=5)]
    assert outcomes == ["result", outcome, "result"]


def test_there_are_500_cases_which_are_those_of_the_seed():
    cases = bad_inputs.make_cases(0)
    assert len(cases) >= 500
    assert [x.name for x in cases] == [x.name for x in bad_inputs.make_cases(0)]
    assert [x.name for x in cases] != [x.name for x in bad_inputs.make_cases(1)]


@pytest.mark.parametrize("family", ["coco", "images", "checkpoints"])
def test_some_of_each_family_are_answered(family):
    cases = [x for x in bad_inputs.make_cases(0) if x.family == family and "description" not in x.name][::8]
    outcomes = zip(cases, bad_inputs.run_cases(cases))
    assert not [(case.name, found) for case, found in outcomes if found[0] not in bad_inputs.OUTCOMES[:2]]
