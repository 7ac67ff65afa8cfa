"""Launching a training script: checks of its processes, a lock on its run folder, Ctrl-C, the next command.

    launch.check_processes("main.py")                 # before anything is loaded
    with launch.only_launch(folder, from_rank0):       # the whole run
        ...

Needs no torch.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ares import cli, files
from ares.cli import UserError, print0

LOCK = ".lock"  # in a run folder while a launch works there
# Number of tasks as job launchers set it. Only torchrun and accelerate set WORLD_SIZE and RANK, which are needed too.
TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_processes(script: str, environment: Mapping[str, str] | None = None) -> None:
    """Raise UserError if a job launcher (srun, mpirun) started several processes that would all be rank 0. Such
    processes would write the same run folder at the same time."""
    env = os.environ if environment is None else environment
    world = _number(env.get("WORLD_SIZE"))
    if world == 1 or None not in (world, _number(env.get("RANK"))):
        return
    if world is not None:
        start = f"start them with torchrun --nproc_per_node {world} {script} ... (it sets both)"
        raise UserError(f"WORLD_SIZE is {world} but RANK is not set, so every process would be rank 0; {start}")
    name = next((name for name in TASKS if (_number(env.get(name)) or 0) > 1), None)
    if name is None:
        return
    tasks, nodes = _number(env[name]), _number(env.get("SLURM_NNODES")) or 1
    start, alone = f"torchrun --nproc_per_node {tasks}", "python"
    if name == "SLURM_NTASKS":
        alone = "srun --ntasks=1 python"
        if nodes > 1:
            start = f"srun --ntasks={nodes} --ntasks-per-node=1 torchrun --nnodes {nodes} --nproc_per_node "
            start += f"{max(1, tasks // nodes)} --rdzv_backend c10d --rdzv_endpoint HOST:29500"
    fix = f"start them with: {start} {script} ... (one process: {alone} {script} ...)"
    raise UserError(
        f"{name} is {tasks} but WORLD_SIZE is not set, so each of {tasks} processes would be rank 0; {fix}"
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None


def note_unused_gpus(visible: int, script: str) -> None:
    """Print a note if one process was started but several GPUs are visible."""
    if visible > 1 and cli.world_size() == 1:
        every = f"accelerate launch --num_processes {visible} {script} ..."
        print0(f"note: {visible} GPUs are visible but one process was started: using one GPU. All of them: {every}")


def use_expandable_segments() -> None:
    """Have torch grow its pieces of GPU memory instead of adding more: batches of ever other lengths leave holes that
    fit nothing else. Before torch is imported; what the user has set stays."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second one is torch's until 2.8
    if any(name in os.environ for name in names):
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("torch").split(".")
        new = [int(part) for part in version[:2] if part.isdigit()] >= [2, 9]
        os.environ[names[0] if new else names[1]] = "expandable_segments:True"


class CtrlC:
    """In the block the first Ctrl-C only sets `pressed`, so that the loop can save and end. A later one stops at once.
    A launcher repeats the signal to its processes: one that follows within GRACE seconds is the same Ctrl-C."""

    GRACE = 3.0
    pressed, _at = False, 0.0

    def __enter__(self) -> CtrlC:
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._in_main:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: Any) -> None:
        if self.pressed and time.monotonic() - self._at > self.GRACE:
            raise KeyboardInterrupt("nothing was saved since the last checkpoint; run the same command again")
        if not self.pressed:
            self.pressed, self._at = True, time.monotonic()
            print0("Ctrl-C: saving after this step, then stopping (once more: stop at once)", file=sys.stderr)


def next_step(*commands: Sequence[Any]) -> None:
    """Print the commands to run next, quoted for a shell."""
    print0("next:", *(shlex.join(map(str, command)) for command in commands), sep="\n  ")


def data_words(args: Any) -> list[str]:
    """The flags that name a run's data, for the command line of another stage."""
    names = ("data_root", "dataset", "img_type", "vision_features", "name_map")
    words = [word for name in names if getattr(args, name) for word in (f"--{name}", str(getattr(args, name)))]
    return [*words, "--caption_file", args.caption_file, "--use_caption"] if args.use_caption else words


@contextlib.contextmanager
def only_one(path: str | os.PathLike, what: str, *, required: bool = True, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` during the block. The kernel releases the lock when the process ends in any way.

    The file's text only says who holds the lock; one left by a killed process locks nobody out. `what` begins the
    message, for example "--run_dir RL_models/x"; unless `required`, a disk that has no locks gives a warning, not an
    error; `wait`: wait for another process instead of raising.

    Raises UserError naming the process that has the lock, or a disk without locks.
    """
    # not the filelock package: it empties the file at each attempt, and on a disk without locks it makes a marker file
    # that outlives a killed process
    import fcntl

    while True:
        with files.writing(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            file = files.open_regular(path, follow_links=False, flags=os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            fault = f"{what}: {_holder(file)} is running there; wait for it, or end it"
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                fault = f"{what}: the disk of {path} has no file locks ({error.strerror}): another process could start"
                if not required:
                    cli.warn0(f"{fault}; do not start one")
                    break
                fault += " (two clients would pay twice); copy the folder to a local disk"
            os.close(file)
            raise UserError(fault) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)  # the process that held the lock has removed the file: lock the new one
    try:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # on a full disk the lock has no text
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(about).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is locked
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a worker process may have inherited the descriptor
        os.close(file)


def _holder(file: int) -> str:
    try:
        about = json.loads(os.pread(file, 1000, 0))
        return f"process {about['pid']} on {about['host']} (since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def only_launch(folder: Path, from_rank0: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Hold the run folder for this launch: rank 0 locks it until the block ends. `from_rank0` calls a function on rank
    0 and raises its UserError on every rank. Raises UserError on every rank if another launch holds the folder."""
    with contextlib.ExitStack() as held:
        from_rank0(lambda: held.enter_context(only_one(folder / LOCK, f"{folder}", required=False)))
        yield
