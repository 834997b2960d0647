"""The processes of a run, started by Detectron2's launcher or by torchrun."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException


def run_processes(
    main: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    find_input_error: Callable[[argparse.Namespace], str | None],
) -> None:
    """Run a program in all its processes, unless its input is wrong: then print what is wrong and exit.

    Args:
        main: what each process runs, after it has joined the others; it parts from them by
            :func:`leave_process_group`.
        args: what :func:`~mnc_d2.engine.argument_parser` returns; given to ``main`` and ``find_input_error``.
        find_input_error: returns what is wrong, in one sentence, or None. It runs before processes are started; under
            torchrun it runs in each process.
    """
    by_torchrun = started_by_torchrun()
    if by_torchrun:
        join_torchrun(timedelta(seconds=args.dist_timeout))
    mistakes = [mistake for mistake in comm.all_gather(find_input_error(args)) if mistake]
    if mistakes:
        if comm.is_main_process():
            _print_error(mistakes[0])
        # torchrun stops all processes when the first one ends: they end after the sentence is printed.
        leave_process_group()
        sys.exit(1)
    if by_torchrun:
        main(args)
        return
    if args.num_gpus > 1 and not torch.cuda.is_available():
        # Processes share the cores; each would start a thread for every one of them.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.num_gpus)))
    several = args.num_machines * args.num_gpus > 1
    if several:
        # They have handlers of their own, which save; this process waits for them.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _forward)
    try:
        launch(
            _run_launched,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args, multiprocessing.get_start_method()),
            timeout=timedelta(seconds=args.dist_timeout),
        )
    except ProcessExitedException as error:  # it has said why
        sys.exit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code)
    except ProcessRaisedException as error:
        sys.exit(str(error))


def _run_launched(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, start_method: str) -> None:
    # A process that was spawned would spawn the workers of its data loaders too, each of which then imports everything
    # anew, and once more in every evaluation. They are started as without a launcher.
    multiprocessing.set_start_method(start_method, force=True)
    main(args)


def _forward(number: int, frame) -> None:
    for process in multiprocessing.active_children():
        if process.pid is not None:
            os.kill(process.pid, number)


@contextmanager
def exit_on_error(*errors: type[Exception]) -> Iterator[None]:
    """End the program with the message of an error of these types, as for wrong input."""
    try:
        yield
    except errors as error:
        _print_error(error)
        leave_process_group(wait=False)
        sys.exit(1)


@contextmanager
def say_how_to_resume(command_words: int = 1) -> Iterator[None]:
    """Print a command, in the main process, where a signal ends the training.

    Args:
        command_words: words of the command line before its options.
    """
    try:
        yield
    except SystemExit:
        if comm.is_main_process():
            options = [x for x in sys.argv[command_words:] if x != "--resume"]
            print("Resume with:", shlex.join([*sys.argv[:command_words], "--resume", *options]), flush=True)
        leave_process_group(wait=False)
        raise


def _print_error(message: object) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)


def count_processes(args: argparse.Namespace) -> tuple[int, int]:
    """Return how many processes a run has on all machines and how many on this one, whether they are started or not.

    Raises:
        ValueError: both torchrun and the arguments give a number, or the arguments contradict each other.
    """
    if not started_by_torchrun():
        if args.num_machines < 1 or args.num_gpus < 0:
            raise ValueError(f"There cannot be {args.num_machines} machines with {args.num_gpus} processes each.")
        if not 0 <= args.machine_rank < args.num_machines:
            raise ValueError(
                f"--machine-rank is {args.machine_rank}, of {args.num_machines} machines. They are numbered from 0."
            )
        if args.num_machines > 1 and args.dist_url == "auto":
            raise ValueError("--dist-url auto is for one machine. Give all of them tcp://HOST:PORT of the first one.")
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
    try:
        device = torch.device(cfg.MODEL.DEVICE)
        if device.type != "cuda":  # GPUs are left to the processes that use them
            torch.zeros(1, device=device).item()
    except Exception as error:  # RuntimeError, NotImplementedError, AssertionError, by the kind of device
        reason = str(error).splitlines()[0]
        raise ValueError(f'MODEL.DEVICE is "{cfg.MODEL.DEVICE}", which PyTorch cannot use: {reason}') from error
    if device.type == "cuda" and num_gpus <= (device.index or 0):
        found = f"{num_gpus} GPUs" if num_gpus else "no GPU"
        raise ValueError(f'MODEL.DEVICE is "{cfg.MODEL.DEVICE}", but PyTorch finds {found} on this machine.')
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


def join_torchrun(timeout: timedelta) -> None:
    """Join the other processes that ``torchrun`` started, as Detectron2's ``launch`` does with those that it starts.

    Args:
        timeout: after which a process that waits for others gives up.
    """
    on_gpu = torch.cuda.is_available()
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # After a restart the store still has where the processes before could be reached: whoever reads that waits for
        # ever. Counts of several machines may differ.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if on_gpu:
        # More processes than GPUs are an error, but for check_device to explain.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def leave_process_group(wait: bool = True) -> None:
    """Wait for the other processes, then part from them; nothing to do for a process on its own.

    Args:
        wait: whether to; False where they may never come.
    """
    if dist.is_initialized():
        # A trainer and its hooks refer to each other: without this its DistributedDataParallel outlives the group.
        gc.collect()
        # Over gloo, which minds no processes that share a GPU, as those do that check_device refuses.
        if wait:
            comm.all_gather(None)
        # Detectron2 caches the group, which then survives its destruction, and so do gloo's threads: one that still
        # holds a tensor when Python shuts down ends the process by SIGABRT.
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()
