"""Training, evaluation and the processes that they run in."""

from .launch import (
    check_device,
    count_processes,
    join_torchrun,
    leave_process_group,
    run_processes,
    started_by_torchrun,
)
from .step import AccumulatingTrainer, ScaleGradientClip, autocast_dtype, check_solver
from .trainer import MNCTrainer

__all__ = [
    "AccumulatingTrainer",
    "MNCTrainer",
    "ScaleGradientClip",
    "autocast_dtype",
    "check_device",
    "check_solver",
    "count_processes",
    "join_torchrun",
    "leave_process_group",
    "run_processes",
    "started_by_torchrun",
]
