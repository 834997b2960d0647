"""Training, evaluation and the processes that they run in."""

from .command_line import argument_parser, build_config, find_input_error
from .folder import check_folder, lock_folder
from .launch import (
    check_device,
    count_processes,
    exit_on_error,
    join_torchrun,
    leave_process_group,
    run_processes,
    say_how_to_resume,
    started_by_torchrun,
)
from .run import train
from .step import AccumulatingTrainer, autocast_dtype, check_solver
from .trainer import MNCTrainer

__all__ = [
    "AccumulatingTrainer",
    "MNCTrainer",
    "argument_parser",
    "autocast_dtype",
    "build_config",
    "check_device",
    "check_folder",
    "check_solver",
    "count_processes",
    "find_input_error",
    "join_torchrun",
    "leave_process_group",
    "lock_folder",
    "exit_on_error",
    "run_processes",
    "say_how_to_resume",
    "started_by_torchrun",
    "train",
]
