"""Numbers of processes, and errors that end a program in a sentence."""

import multiprocessing
import sys

import pytest

from mnc_d2.engine import argument_parser, count_processes, exit_on_error, launch, say_how_to_resume


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (1, 1)),
        (["--num-gpus", "4"], (4, 4)),
        (["--num-gpus", "4", "--num-machines", "2", "--machine-rank", "1", "--dist-url", "tcp://host:1"], (8, 4)),
    ],
)
def test_number_of_processes(arguments, expected):
    assert count_processes(argument_parser().parse_args(arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine-rank", "1"], "--machine-rank is 1, of 1 machines"),
        (["--machine-rank", "2", "--num-machines", "2"], "--machine-rank is 2, of 2 machines"),
        (["--machine-rank", "-1", "--num-machines", "2"], "--machine-rank is -1"),
        (["--num-machines", "0"], "0 machines"),
        (["--num-gpus", "-1"], "-1 processes"),
        (["--num-machines", "2", "--dist-url", "auto"], "--dist-url auto is for one machine"),
    ],
)
def test_processes_that_cannot_be_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        count_processes(argument_parser().parse_args(arguments))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e300", "soon"])
def test_a_timeout_is_a_time(seconds, capsys):
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["--dist-timeout", seconds])
    assert "--dist-timeout" in capsys.readouterr().err


def test_processes_of_the_launcher_start_their_own_as_without_it():
    before, methods = multiprocessing.get_start_method(), []
    multiprocessing.set_start_method("spawn", force=True)  # as in a process that was spawned
    try:
        launch._run_launched(lambda _: methods.append(multiprocessing.get_start_method()), None, before)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert methods == [before]


def test_an_error_of_the_given_types_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/program.py"])
    with pytest.raises(SystemExit) as stop:
        with exit_on_error(ValueError):
            raise ValueError("This is wrong.")
    assert stop.value.code == 1
    assert capsys.readouterr().err == "program.py: This is wrong.\n"
    with pytest.raises(KeyError):
        with exit_on_error(ValueError):
            raise KeyError("a mistake in the program")


def test_the_command_that_resumes_has_the_option_once_and_in_front(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program.py", "--resume", "DATASETS.TEST", "('a',)"])
    with pytest.raises(SystemExit):
        with say_how_to_resume():
            raise SystemExit(143)
    assert capsys.readouterr().out == """Resume with: program.py --resume DATASETS.TEST '('"'"'a'"'"',)'\n"""
