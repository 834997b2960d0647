"""The processes of a run, started by Detectron2's launcher or by torchrun, and the devices they need."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm


def run_processes(
    main: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    find_mistake: Callable[[argparse.Namespace], str | None],
) -> None:
    """Run a program in all its processes, unless its input is wrong: then print what is wrong and exit.

    Args:
        main: what each process runs, after it has joined the others; it parts from them by
            :func:`leave_process_group`.
        args: what Detectron2's ``default_argument_parser`` returns; given to ``main`` and ``find_mistake``.
        find_mistake: returns what is wrong, in one sentence, or None. It runs before processes are started, or in each
            of those that torchrun started.
    """
    by_torchrun = started_by_torchrun()
    if by_torchrun:
        join_torchrun()
    mistakes = [mistake for mistake in comm.all_gather(find_mistake(args)) if mistake]
    if mistakes:
        if comm.is_main_process():
            print(f"{os.path.basename(sys.argv[0])}: {mistakes[0]}", file=sys.stderr, flush=True)
        # torchrun stops all processes when the first one ends: they end after the sentence is printed.
        leave_process_group()
        sys.exit(1)
    if by_torchrun:
        main(args)
        return
    if args.num_gpus > 1 and not torch.cuda.is_available():
        # Processes share the cores; each would start a thread for every one of them.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.num_gpus)))
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def count_processes(args: argparse.Namespace) -> tuple[int, int]:
    """Return how many processes a run has on all machines and how many on this one, whether they are started or not.

    Raises:
        ValueError: both torchrun and the arguments give a number.
    """
    if not started_by_torchrun():
        return args.num_machines * args.num_gpus, args.num_gpus
    if args.num_gpus > 1 or args.num_machines > 1:
        raise ValueError("torchrun starts the processes already. Leave out --num-gpus and --num-machines.")
    return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])


def check_device(cfg: CfgNode, num_local_processes: int) -> None:
    """Check that the processes of this machine can have the device that the config names.

    Args:
        cfg: the config of the run.
        num_local_processes: processes on this machine.

    Raises:
        ValueError: they cannot; the message says why.
    """
    num_gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and num_gpus == 0:
        raise ValueError(f'MODEL.DEVICE is "{cfg.MODEL.DEVICE}", but PyTorch finds no GPU on this machine.')
    if num_gpus == 0 or num_local_processes <= 1:
        return
    # Where there are GPUs the processes talk over NCCL, which knows no CPU tensors and one process a GPU.
    if cfg.MODEL.DEVICE == "cpu":
        raise ValueError(
            "Several processes on a machine with GPUs run on these. To run them on the CPU, hide the GPUs: set "
            'CUDA_VISIBLE_DEVICES="" in the environment.'
        )
    if num_local_processes > num_gpus:
        raise ValueError(
            f"{num_local_processes} processes need as many GPUs; PyTorch finds {num_gpus} on this machine."
        )


def started_by_torchrun() -> bool:
    """Return whether the environment has what ``torchrun`` tells each of the processes that it starts."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names)


def join_torchrun() -> None:
    """Join the other processes that ``torchrun`` started, as Detectron2's ``launch`` does with those that it starts."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if on_gpu:
        # More processes than GPUs are an error, but for check_device to explain.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def leave_process_group() -> None:
    """Wait for the other processes, then part from them; nothing to do for a process on its own."""
    if dist.is_initialized():
        # A trainer and its hooks refer to each other: without this its DistributedDataParallel outlives the group.
        gc.collect()
        # Over gloo, which minds no processes that share a GPU, as those do that check_device refuses.
        comm.all_gather(None)
        # Detectron2 caches the group, which then survives its destruction, and so do gloo's threads: one that still
        # holds a tensor when Python shuts down ends the process by SIGABRT.
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()
