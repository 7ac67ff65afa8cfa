"""How a training script is started, kept alone in its run folder, stopped, and followed by the next one.

    launch.check_processes("main.py")                 # before anything is loaded
    with launch.only_launch(folder, from_rank0):       # the whole run
        ...

Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
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


# -- processes -------------------------------------------------------------------------------------------


def check_processes(script: str, environment: Mapping[str, str] | None = None) -> None:
    """Raise UserError if a job launcher (srun, mpirun) started several processes that each take themselves for rank 0.

    Such processes would write the same run folder at the same time.
    """
    env = os.environ if environment is None else environment
    world = _number(env.get("WORLD_SIZE"))
    if world is not None and (world == 1 or _number(env.get("RANK")) is not None):
        return
    if world is not None:
        raise UserError(
            f"WORLD_SIZE is {world} but RANK is not set, so every process would be rank 0; start them with "
            f"torchrun --nproc_per_node {world} {script} ... (it sets both)"
        )
    for name in TASKS:
        tasks = _number(env.get(name))
        if tasks is not None and tasks > 1:
            nodes = _number(env.get("SLURM_NNODES")) or 1
            how = (
                f"srun --ntasks={nodes} --ntasks-per-node=1 torchrun --nnodes {nodes} --nproc_per_node "
                f"{max(1, tasks // nodes)} --rdzv_backend c10d --rdzv_endpoint HOST:29500 {script} ..."
                if name == "SLURM_NTASKS" and nodes > 1
                else f"torchrun --nproc_per_node {tasks} {script} ..."
            )
            alone = f"srun --ntasks=1 python {script} ..." if name == "SLURM_NTASKS" else f"python {script} ..."
            raise UserError(
                f"{name} is {tasks} but WORLD_SIZE is not set, so each of {tasks} processes would be rank 0; "
                f"start them with: {how} (one process: {alone})"
            )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None


def note_unused_gpus(visible: int, script: str) -> None:
    """Say that a launch of one process uses one of several visible GPUs."""
    if visible > 1 and cli.world_size() == 1:
        print0(
            f"note: {visible} GPUs are visible but one process was started: using one GPU. "
            f"All of them: accelerate launch --num_processes {visible} {script} ..."
        )


# -- stopping --------------------------------------------------------------------------------------------


class CtrlC:
    """Within the block the first Ctrl-C only sets `pressed`: the loop saves and ends. A later one stops at once.

    A launcher repeats the signal to its processes: one that follows within GRACE seconds is the same Ctrl-C.
    """

    GRACE = 3.0

    def __init__(self) -> None:
        self.pressed = False
        self._at = 0.0

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


def next_step(*commands: Sequence[Any], note: str = "") -> None:
    """Print what to run now, as a shell reads it."""
    print0(f"next:{' ' + note if note else ''}")
    for command in commands:
        print0("  " + shlex.join(map(str, command)))


def data_words(args: Any) -> list[str]:
    """The flags that name a run's data, for another stage's command line."""
    names = ("data_root", "dataset", "img_type", "vision_features", "name_map")
    words = [word for name in names if getattr(args, name) for word in (f"--{name}", str(getattr(args, name)))]
    return [*words, "--caption_file", args.caption_file, "--use_caption"] if args.use_caption else words


# -- one launch per run folder ---------------------------------------------------------------------------


@contextlib.contextmanager
def only_launch(folder: Path, from_rank0: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Hold the run folder for this launch: rank 0 locks it until the block ends.

    `from_rank0` calls a function on rank 0 and raises its UserError on every rank. Raises UserError on every rank
    if another launch holds the folder.
    """
    with contextlib.ExitStack() as held:
        from_rank0(lambda: held.enter_context(files.only_one(folder / LOCK, f"{folder}", required=False)))
        yield
