"""A chain of commands as resumable stages: each is printed, logged, timed, recorded, and not run twice.

    chain = Chain(Path("runs/base"))
    chain.run([Stage("rl", "RL", ["python run_mm_cot_rl.py ..."], uses=["start"], makes=[run / "rl"])])

Used by run_ares.py. A command is text as it could be typed in bash at the project's root.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares import files, launch
from ares.cli import UserError, print0

ROOT = Path(__file__).resolve().parents[1]
LOCK = ".stages_lock"
TAIL = 15  # lines of a failed command's log that are shown
SAVING_SECONDS = 600.0  # for commands to save and end after SIGINT
ENDING_SECONDS = 45.0  # after SIGTERM: torchrun gives its own processes 30
LAST_LINES_SECONDS = 10.0  # for the others of commands that run together, once the first has ended
SCRIPT_WORDS = (".py", ".sh")  # ends of the word from which on a command counts as the same: its launcher may change


@dataclass
class Stage:
    """Commands that run in order, `at_once` at a time; `uses` are the stages whose files they read.

    With `together` all run at the same time, and the stage ends with the first of them, or with an error of any (RL
    and its Teacher). `makes` are the files and folders that a redo deletes.
    """

    name: str
    title: str
    commands: Sequence[str]
    uses: Sequence[str] = ()
    makes: Sequence[Path] = ()
    at_once: int = 1
    together: bool = False

    def identity(self) -> list[list[str]]:
        """The commands without their launchers: how many processes a stage had does not matter later."""
        return [from_script(shlex.split(command)) for command in self.commands]


def from_script(words: list[str]) -> list[str]:
    """The words of a command from its script on."""
    start = next((i for i, word in enumerate(words) if word.endswith(SCRIPT_WORDS)), 0)
    return words[start:]


class Chain:
    """Runs stages in a folder. {folder}/stages.json records the finished ones, and the finished commands of one that
    was stopped between two; {folder}/logs/{stage}.log has their output. Whoever changes anything there holds `only`.

    Raises UserError for a record that is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.record_file = folder, folder / "stages.json"
        self.redo_file = folder / "redo.json"  # stages that an unfinished run began anew -> their commands
        self.done: dict[str, dict[str, Any]] = {}
        self.begun: dict[str, list[list[str]]] = {}  # unfinished stage -> its finished commands
        if self.record_file.exists():
            record = files.read_json(self.record_file, "--output", dict)
            self.done, self.begun = record.get("stages"), record.get("begun", {})
            for stages, kind in ((self.done, dict), (self.begun, list)):
                if not isinstance(stages, dict) or not all(isinstance(stage, kind) for stage in stages.values()):
                    raise UserError(f"--output: {self.record_file} is damaged; delete it: finished stages end at once")
        # OpenMP's threads spin while they wait, which costs a shared machine more than a tiny model gains
        threads = {} if shutil.which("nvidia-smi") else {"OMP_NUM_THREADS": "1"}
        self.environment = {**threads, **os.environ, "PYTHON": sys.executable, "TOKENIZERS_PARALLELISM": "false"}
        # launchers such as accelerate lie beside this python, also where its environment is not activated
        path = os.environ.get("PATH", os.defpath)
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"

    @staticmethod
    def only(folder: Path) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of the one chain that works in `folder`. Raises UserError if another process holds it."""
        return launch.only_one(folder / LOCK, f"--output {folder}")

    # -- what is done --------------------------------------------------------------------------------------

    def change(self, stage: Stage) -> str | None:
        """What has changed since `stage` was finished, in words; None for nothing, or if it is not finished."""
        record = self.done.get(stage.name)
        if record is None:
            return None
        for before, now in zip(record.get("commands", []), stage.identity(), strict=False):
            if before != now:
                removed = [word for word in before if word not in now]
                added = [word for word in now if word not in before]
                return f"its command had {shlex.join(removed) or 'less'} and now has {shlex.join(added) or 'less'}"
        if len(record.get("commands", [])) != len(stage.commands):
            return f"it had {len(record.get('commands', []))} commands and now has {len(stage.commands)}"
        for name in stage.uses:
            if record.get("used", {}).get(name) != self.done.get(name, {}).get("id"):
                return f"{name} has run again since"
        return None

    def forget(self, stage: Stage) -> None:
        """Delete what `stage` made, inside the folder only (not by a link that leads out), and its record."""
        for path in stage.makes:
            if self.may_delete(path):
                _delete(path)
        (self.folder / "logs" / f"{stage.name}.log").unlink(missing_ok=True)
        if [self.done.pop(stage.name, None), self.begun.pop(stage.name, None)] != [None, None]:
            self._save()

    def may_delete(self, path: Path) -> bool:
        """Whether `path` lies inside the folder (not by a link that leads out)."""
        return self.folder.resolve() in path.resolve().parents

    def clear(self) -> None:
        """Delete all that is in the folder but for its lock: the record of finished stages first, run.json last."""
        order = {self.record_file.name: 0, "run.json": 2}
        for path in sorted(self.folder.iterdir(), key=lambda path: order.get(path.name, 1)):
            if path.name != LOCK:
                _delete(path)
        self.done, self.begun = {}, {}

    def _save(self) -> None:
        files.write_json(self.record_file, {"stages": self.done, **({"begun": self.begun} if self.begun else {})})

    # -- running -------------------------------------------------------------------------------------------

    def run(self, stages: Sequence[Stage]) -> None:
        """Run those that are not finished, in order. Raises UserError for one that fails."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        for stage in stages:
            if stage.name in self.done:
                print0(f"== {stage.name}: {stage.title}: done before")
                continue
            print0(f"== {stage.name}: {stage.title}")
            began, cpu = time.monotonic(), _cpu_seconds()
            self.run_commands(stage)
            seconds, cpu = time.monotonic() - began, _cpu_seconds() - cpu
            used = {name: self.done.get(name, {}).get("id") for name in stage.uses}
            self.begun.pop(stage.name, None)
            self.done[stage.name] = {
                "title": stage.title, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
                "id": uuid.uuid4().hex[:12], "commands": stage.identity(), "used": used,
            }  # fmt: skip
            self._save()
            print0(f"   {seconds:.0f} s")

    def run_commands(self, stage: Stage) -> None:
        """Run the commands of a stage that have not finished; ends them all where one fails."""
        finished = [] if stage.together else self.begun.get(stage.name, [])
        waiting = [command for command in stage.commands if from_script(shlex.split(command)) not in finished]
        running: dict[subprocess.Popen, str] = {}
        at_once = len(waiting) if stage.together else stage.at_once
        log = self.folder / "logs" / f"{stage.name}.log"
        with _progress(log) as show, _guard() as watch:
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        command = waiting.pop(0)
                        running[self.start(command, log)] = command
                        watch(running)
                    time.sleep(0.2)
                    show()
                    for process in [one for one in running if one.poll() is not None]:
                        if process.returncode:
                            raise UserError(self.failure(stage, process, log))
                        command = running.pop(process)
                        watch(running)
                        if not stage.together:
                            self.begun.setdefault(stage.name, []).append(from_script(shlex.split(command)))
                            self._save()
                        elif command == stage.commands[0]:  # a restarted Teacher would wait for more of it
                            _wait(running, LAST_LINES_SECONDS)
                            return
            finally:
                _stop(running)

    def start(self, command: str, log: Path) -> subprocess.Popen:
        """Start `command` with this environment's python; its output is appended to `log`."""
        words = shlex.split(command)
        print0(f"   $ {shlex.join(words)}")
        if "python" in words:
            words[words.index("python")] = sys.executable
        with open(log, "a", encoding="utf-8") as opened:
            opened.write(f"$ {command}\n")
            opened.flush()
            options = {"stdout": opened, "stderr": subprocess.STDOUT, "start_new_session": True}
            options["preexec_fn"] = _heed_sigint
            try:
                return subprocess.Popen(words, cwd=ROOT, env=self.environment, **options)
            except OSError as error:
                raise UserError(f"{words[0]}: cannot be started ({error.strerror}); is it installed?") from error

    def not_found(self, stage: Stage) -> str | None:
        """A message that names a program that `stage` would start and that is not there."""
        for command in stage.commands:
            if not shutil.which(name := shlex.split(command)[0], path=self.environment["PATH"]):
                return f"{name}: cannot be started (not found); is it installed?"
        return None

    @staticmethod
    def failure(stage: Stage, process: subprocess.Popen, log: Path) -> str:
        """One text: the command that failed, the end of its log, what to do."""
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
        status = process.returncode
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        command = shlex.join(from_script(list(process.args)))
        again = "What is finished is kept: correct the cause, then run the same command again."
        return f"stage {stage.name} {how}: {command}\nThe end of {log}:\n{tail}\n{again}"


def _heed_sigint() -> None:
    """In a child: SIGINT ends it. What a script starts by `&` ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _delete(path: Path) -> None:
    """Delete a file, a link or a whole folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _wait(processes: Iterable[subprocess.Popen], seconds: float) -> None:
    """Wait until all have ended, with what they started, at most so long."""
    end = time.monotonic() + seconds
    while _left(processes) and time.monotonic() < end:
        time.sleep(0.05)


def _left(processes: Iterable[subprocess.Popen]) -> set[int]:
    """The process groups in which a process is left: `accelerate launch` may end before what it has started."""
    groups = {process.pid for process in processes}
    left = {process.pid for process in processes if process.poll() is None}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = file.read_text(errors="replace").rpartition(")")[2].split()[:3]
            left |= {int(group)} & groups if state != "Z" else set()
    return left


def _stop(processes: Iterable[subprocess.Popen]) -> None:
    """End process groups: by SIGINT, after which training saves and clients wait for replies that are paid; after
    SAVING_SECONDS or a second Ctrl-C by SIGTERM, then by SIGKILL."""
    for number, seconds in ((signal.SIGINT, SAVING_SECONDS), (signal.SIGTERM, ENDING_SECONDS), (signal.SIGKILL, 5)):
        with contextlib.suppress(KeyboardInterrupt):
            for group in _left(processes):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, number)
            _wait(processes, 1)
            if number == signal.SIGINT and _left(processes):
                print0("   waiting until the commands have saved their work (Ctrl-C: end them now)")
            _wait(processes, seconds)


@contextlib.contextmanager
def _guard() -> Iterator[Callable[[Iterable[subprocess.Popen]], None]]:
    """A function that takes the running commands. If this process is killed, a shell ends their process groups by
    SIGTERM: its input ends then. (PR_SET_PDEATHSIG would only reach a launcher, not what it has started.)"""
    script = 'while read -r line; do groups=$line; done; [ -z "$groups" ] || kill -s TERM -- $groups'
    pipe = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "bufsize": 1}
    with subprocess.Popen(["sh", "-c", script], start_new_session=True, **pipe) as shell:

        def watch(processes: Iterable[subprocess.Popen]) -> None:
            shell.stdin.write(" ".join(f"-{process.pid}" for process in processes) + "\n")

        try:
            yield watch
        finally:
            watch([])


def _cpu_seconds() -> float:
    """Processor time of all ended children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _progress(log: Path) -> Iterator[Callable[[], None]]:
    """In a terminal: a function that shows the time and the last line of `log`, at most twice a second."""
    began, shown = time.monotonic(), 0.0

    def show() -> None:
        nonlocal shown
        if time.monotonic() - shown < 0.5 or not log.exists():
            return
        shown = time.monotonic()
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 2000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
        minutes, seconds = divmod(int(shown - began), 60)
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K   {minutes}:{seconds:02d}  {lines[-1] if lines else ''}"[: width + 4], end="", flush=True)

    if not sys.stdout.isatty():
        yield lambda: None
        return
    try:
        yield show
    finally:
        print("\r\x1b[K", end="", flush=True)
