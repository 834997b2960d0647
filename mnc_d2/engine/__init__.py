"""Training, evaluation and the processes that they run in."""

from .command_line import argument_parser, build_config, find_mistake
from .folder import check_folder, lock_folder
from .launch import (
    check_device,
    count_processes,
    join_torchrun,
    leave_process_group,
    one_sentence,
    run_processes,
    say_how_to_resume,
    started_by_torchrun,
)
from .run import train
from .step import AccumulatingTrainer, ScaleGradientClip, autocast_dtype, check_solver
from .trainer import MNCTrainer

__all__ = [
    "AccumulatingTrainer",
    "MNCTrainer",
    "ScaleGradientClip",
    "argument_parser",
    "autocast_dtype",
    "build_config",
    "check_device",
    "check_folder",
    "check_solver",
    "count_processes",
    "find_mistake",
    "join_torchrun",
    "leave_process_group",
    "lock_folder",
    "one_sentence",
    "run_processes",
    "say_how_to_resume",
    "started_by_torchrun",
    "train",
]
