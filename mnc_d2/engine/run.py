"""A whole training, as the programs of this project run it in each of their processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from .folder import lock_folder
from .launch import exit_on_error, say_how_to_resume
from .trainer import MNCTrainer


def train(cfg: CfgNode, resume: bool, more_hooks: Sequence[HookBase] = (), command_words: int = 1) -> dict:
    """Train, from the last checkpoint if ``resume``. What ends the training ends the program, in one sentence.

    Args:
        cfg: the config of the run.
        resume: whether to go on with what is in OUTPUT_DIR.
        more_hooks: after the trainer's.
        command_words: words of the command line before its options, for the advice how to resume.

    Returns:
        the results of the last evaluation, empty in all processes but the main one.
    """
    with ExitStack() as stack:
        with exit_on_error(ValueError, OSError):
            if comm.is_main_process():
                stack.enter_context(lock_folder(cfg.OUTPUT_DIR))
        trainer = MNCTrainer(cfg)
        trainer.register_hooks(list(more_hooks))
        with exit_on_error(ValueError, OSError):
            trainer.resume_or_load(resume=resume)
        with exit_on_error(FloatingPointError, OSError), say_how_to_resume(command_words):
            return trainer.train()
