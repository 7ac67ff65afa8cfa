"""run_ares.py: the whole chain on the smallest demo and on real questions, also killed; configurations; the plan."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import run_ares
from ares import files, launch
from ares.cli import UserError
from pipeline import plan, stages
from pipeline.config import Config
from pipeline.stages import Chain, Stage, from_script
from teacher import handoff
from tests.conftest import ROOT, run_script
from tests.rl import rl_tools
from tests.tools.report_tools import parts_of

PREDICTIONS = {f"predictions_ans_{name}.json" for name in ("train", "eval", "test")}
SCRIPT = ("run_ares.py", "--config")
CONFIGS = sorted(path.name for path in ROOT.glob("configs/*.yaml") if "prepare" in path.read_text())


def read(path: Path):
    return json.loads(path.read_text())


# -- stages ----------------------------------------------------------------------------------------------


def python(code: str) -> str:
    return shlex.join(["python", "-c", code])


def test_finished_stages_are_not_run_again_and_changes_are_said(tmp_path):
    chain = Chain(tmp_path)
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    first, second = Stage("a", "A", [python(count)], makes=[tmp_path / "count"]), Stage("b", "B", [python("1")], ["a"])
    chain.run([first, second])
    again = Chain(tmp_path)
    again.run([first, second])
    assert (tmp_path / "count").read_text() == "x"
    assert again.change(first) is again.change(second) is None
    assert "2" in again.change(Stage("b", "B", [python("2")], ["a"]))
    again.forget(first)
    assert not (tmp_path / "count").exists() and again.change(second) == "a has run again since"
    again.run([first, second])
    assert (tmp_path / "count").read_text() == "x" and again.change(second) == "a has run again since"


def test_a_redo_deletes_nothing_outside_the_run(tmp_path):
    outside, run = tmp_path / "model", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    (run / "link").symlink_to(outside)
    chain = Chain(run)
    (outside / "inner").mkdir()
    for path in (outside, run, run / ".." / "model", run / "link", run / "link/inner"):
        chain.forget(Stage("a", "A", [], makes=[path]))
    assert (outside / "inner").is_dir() and run.is_dir()


def test_a_failed_command_is_shown_with_the_end_of_its_log_and_ends_those_beside_it(tmp_path):
    sleeper = python(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)"
    failing = python(f"{wait}\nprint('the reason'); raise SystemExit(3)")
    began = time.monotonic()
    with pytest.raises(
        UserError, match="(?s)stage x ended with status 3.*the reason.*run the same command again"
    ) as error:
        Chain(tmp_path).run([Stage("x", "X", [sleeper, failing], together=True)])
    assert "x.log" in str(error.value) and time.monotonic() - began < 40
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert "x" not in Chain(tmp_path).done
    with pytest.raises(UserError, match="no-such-launcher"):
        Chain(tmp_path).run([Stage("y", "Y", ["no-such-launcher main.py"])])


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "script &"])
def test_a_stage_ends_with_the_first_of_its_commands_that_run_together(handler, tmp_path, monkeypatch, request):
    """RL has ended, a Teacher that was started again with it waits for questions that never come. What a script starts
    by & ignores SIGINT."""
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, handler)))
    monkeypatch.setattr(stages, "LAST_LINES_SECONDS", 0.5)
    pid = tmp_path / "pid"
    waiting = python(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    first = python(f"import os, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.05)")
    began = time.monotonic()
    Chain(tmp_path).run([Stage("rl", "RL", [first, waiting], together=True)])
    assert time.monotonic() - began < 40 and "rl" in Chain(tmp_path).done
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_finished_commands_of_a_stopped_stage_are_not_run_again(tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    fails = python(f"import os; raise SystemExit(not os.path.exists({str(tmp_path / 'fixed')!r}))")
    stage = Stage("rl", "RL", [python(count), fails, python(f"{count} # again")], makes=[tmp_path / "count"])
    with pytest.raises(UserError, match="stage rl ended with status 1"):
        Chain(tmp_path).run([stage])
    (tmp_path / "fixed").touch()
    Chain(tmp_path).run([stage])
    assert (tmp_path / "count").read_text() == "xx" and Chain(tmp_path).begun == {}
    Chain(tmp_path).forget(stage)
    Chain(tmp_path).run([stage])
    assert (tmp_path / "count").read_text() == "xx"


def test_a_redo_forgets_the_finished_commands_of_a_stopped_stage_after_it(tmp_path):
    """A generation that ended before the kill was of the old model."""
    first, then = Stage("rl", "RL", [python("1")]), Stage("generate", "G", [python("2"), python("3")], ["rl"])
    chain = Chain(tmp_path)
    chain.run([first])
    chain.begun["generate"] = [shlex.split(then.commands[0])]
    assert run_ares.to_forget([first, then], chain, False, {"rl"}) == [first, then]


@pytest.mark.parametrize("flag", ["--redo prepare", "--fresh"])
@pytest.mark.parametrize("seeds", ["0", "0 1"])
def test_a_repeated_redo_goes_on_where_it_was_killed(tmp_path, capsys, flag, seeds):
    """What the Teacher was paid for is not deleted by the same command, also of a seed that had ended before."""
    count, fixed = tmp_path / "count", tmp_path / "fixed"
    last = seeds[-1]
    counts = python(f"open({str(count)!r}, 'a').write('{{seed}}')")
    fails = python(f"import os; raise SystemExit('{{seed}}' == '{last}' and not os.path.exists({str(fixed)!r}))")
    config = tmp_path / "quick.yaml"
    config.write_text(f"extends: {ROOT}/configs/smoke.yaml\nprepare: {json.dumps([counts, fails])}\nfeatures: null\n")
    words = ["--config", str(config), "--output", str(tmp_path / "run"), "--until", "prepare"]
    words += ["--seeds", *seeds.split()] if " " in seeds else []
    run = tmp_path / ("run/seed1" if " " in seeds else "run")

    def stopped(*more: str) -> str:
        with pytest.raises(UserError, match="stage prepare ended with status 1"):
            run_ares.main([*words, *more])
        return count.read_text()

    once = seeds.replace(" ", "")
    fixed.touch()
    run_ares.main(words)
    fixed.unlink()
    old, paid = run / "data/old.txt", run / "data/paid.txt"
    old.parent.mkdir()
    old.touch()
    assert stopped(*flag.split()) == once * 2 and not old.exists()
    paid.parent.mkdir()
    paid.touch()
    assert stopped(*flag.split()) == once * 2 and paid.exists()
    assert stopped("--redo", "judge") == once * 2  # another one does not make it forget
    fixed.touch()
    run_ares.main([*words, *flag.split()])
    assert count.read_text() == once * 2 and paid.exists()
    assert f"{flag}: goes on with what a stopped run has begun anew" in capsys.readouterr().out
    run_ares.main([*words, *flag.split()])  # that had ended: begun anew once more
    assert count.read_text() == once * 3 and not paid.exists()


LAUNCHER = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"  # passes nothing on
TRAINING = """
import os, signal, sys, time
def save(number, frame):
    open({0!r} + '/asked', 'a').write(str(int(number)) + ' ')
    if number == 2 and not os.path.exists({0!r} + '/stubborn'):
        time.sleep(1.5)
        open({0!r} + '/saved', 'w').close()
        sys.exit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
open({0!r} + '/pid', 'w').write(str(os.getpid()))
while True: time.sleep(0.05)
"""


def launched(folder: Path) -> str:
    """A command whose work is done by a process that its launcher started, as by `accelerate launch`."""
    return shlex.join(["python", "-c", LAUNCHER, TRAINING.format(str(folder))])


def until(what, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    """A process that has ended but that nobody waits for is not alive."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("together", [True, False])
def test_a_failure_ends_what_a_launcher_beside_it_has_started(tmp_path, together):
    """After it has saved."""
    wait = (
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\nraise SystemExit(3)"
    )
    commands = [launched(tmp_path), python(wait)]
    with pytest.raises(UserError, match="ended with status 3"):
        Chain(tmp_path).run([Stage("rl", "RL", commands, together=together, at_once=2)])
    assert (tmp_path / "saved").exists() and not alive(int((tmp_path / "pid").read_text()))


def test_what_a_failed_launcher_has_started_ends_with_it(tmp_path):
    started = shlex.quote(TRAINING.format(str(tmp_path)))
    failing = shlex.join(
        ["sh", "-c", f"python3 -c {started} & while ! [ -e {tmp_path}/pid ]; do sleep 0.1; done; exit 4"]
    )
    with pytest.raises(UserError, match="ended with status 4"):
        Chain(tmp_path).run([Stage("rl", "RL", [failing])])
    until(lambda: not alive(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize("number, seen", [(signal.SIGINT, "2"), (signal.SIGTERM, "2"), (signal.SIGKILL, "15")])
def test_a_stopped_chain_ends_its_commands_after_they_have_saved(tmp_path, number, seen):
    (tmp_path / "quick.yaml").write_text(
        json.dumps({"extends": f"{ROOT}/configs/smoke.yaml", "prepare": [launched(tmp_path)]})
    )
    words = [sys.executable, *SCRIPT, str(tmp_path / "quick.yaml"), "--output", str(tmp_path / "run")]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    piped["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the tests may run by & in a script
    chain = subprocess.Popen([*words, "--until", "prepare"], cwd=ROOT, **piped)
    until((tmp_path / "pid").exists)
    time.sleep(0.3)
    chain.send_signal(number)
    output, _ = chain.communicate(timeout=60)
    pid = int((tmp_path / "pid").read_text())
    asked = tmp_path / "asked"
    assert until(lambda: asked.exists() and asked.read_text()) and asked.read_text().split()[0] == seen
    if number == signal.SIGKILL:  # this stand-in does not end by SIGTERM
        os.kill(pid, signal.SIGKILL)
    else:
        assert (tmp_path / "saved").exists() and not alive(pid)
        assert chain.returncode == 130 and "waiting until the commands have saved" in output, output


def test_commands_that_do_not_end_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "SAVING_SECONDS", 0.5)
    monkeypatch.setattr(stages, "ENDING_SECONDS", 0.5)
    (tmp_path / "stubborn").touch()
    failing = python(f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\n1/0")
    with pytest.raises(UserError, match="ended with status 1"):
        Chain(tmp_path).run([Stage("rl", "RL", [launched(tmp_path), failing], together=True)])
    assert (tmp_path / "asked").read_text().split() == ["2", "15"]
    assert not alive(int((tmp_path / "pid").read_text()))


def test_another_launcher_is_no_change():
    words = "accelerate launch --num_processes 4 main.py --lr 1"
    assert from_script(words.split()) == from_script("python main.py --lr 1".split()) == ["main.py", "--lr", "1"]


# -- what is deleted, and when ---------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path):
    """A run whose stage prepare is finished, and the words that run it again; nothing of it costs time."""
    config = tmp_path / "quick.yaml"
    config.write_text(f"extends: {ROOT}/configs/smoke.yaml\nprepare: [python -c 1]\nfeatures: null\n")
    words = ["--config", str(config), "--output", str(tmp_path / "run")]
    run_ares.main([*words, "--until", "prepare", "--seeds", "3", "4"])
    run_ares.main([*words, "--until", "prepare"])
    for folder in ("run", "run/seed3", "run/seed4"):
        paid = tmp_path / folder / "rl/questions/score.txt"
        paid.parent.mkdir(parents=True)
        paid.write_text("0.5")
    return words


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SEEDS = ("--seeds", "3", "4")


@pytest.mark.parametrize("words, fault", [
    (("--fresh", "--redo", "slf"), "--redo: no stage slf"),
    (("--fresh", "--from", "slf"), "--from: no stage slf"),
    (("--fresh", "--only", "rl"), "--only: start is not finished"),
    (("--redo", "prepare", "--until", "slf"), "--until: no stage slf"),
    ((*SEEDS, "--redo", "prepare", "slf"), "--redo: no stage slf"),
    ((*SEEDS, "--fresh", "--from", "table"), "--from: start is not finished"),
])  # fmt: skip
def test_wrong_arguments_delete_nothing(earlier, tmp_path, words, fault):
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match=fault):
        run_ares.main([*earlier, *words])
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("words", [("--fresh",), ("--redo", "prepare"), (*SEEDS, "--fresh"), ("--until", "prepare")])
def test_nothing_changes_while_another_chain_runs_in_the_folder(earlier, tmp_path, words):
    busy = tmp_path / ("run/seed4" if "4" in words else "run")
    with launch.only_one(busy / ".stages_lock", "chain"):
        before = tree(tmp_path / "run")
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is running there"):
            run_ares.main([*earlier, *words, "--set", "rl.lr=1e-3"])
        assert tree(tmp_path / "run") == before
        run_ares.main([*earlier, *words, "--dry_run"])


@pytest.mark.parametrize(
    "words, kept", [((), "run/seed3 run/seed4"), (SEEDS, "run"), (("--seeds", "4"), "run run/seed3")]
)
def test_fresh_deletes_the_folders_of_its_own_runs(earlier, tmp_path, words, kept):
    folders = ["run", "run/seed3", "run/seed4"]
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder in folders:
        (tmp_path / folder / "link").symlink_to(outside)
    run_ares.main([*earlier, *words, "--fresh", "--until", "prepare"])
    left = [folder for folder in folders if (tmp_path / folder / "rl").exists()]
    assert left == (kept.split() if words else []) and outside.is_dir()
    for seed in words[1:]:
        assert sorted(os.listdir(tmp_path / f"run/seed{seed}")) == ["logs", "run.json", "stages.json"]


def model_outside(tmp_path, *changes) -> list[str]:
    """Words of a run whose starting model would be trained outside of it, where one is already."""
    (tmp_path / "models/own").mkdir(parents=True)
    return ["--set", f"start.folder={tmp_path}/models/own", *changes]


@pytest.mark.parametrize("words", [("--redo", "start"), ("--fresh",)])
def test_a_model_outside_the_run_is_not_taken_for_a_new_one(earlier, tmp_path, words):
    """It stays where it is, so a redo would take the old one."""
    words = [*earlier, *words, "--until", "prepare", *model_outside(tmp_path)]
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match=f"{words[4]}: .*models/own is outside .*run and stays; delete it first"):
        run_ares.main(words)
    assert tree(tmp_path / "run") == before
    (tmp_path / "models/own").rmdir()
    run_ares.main(words)


def test_seeds_do_not_share_a_starting_model_that_they_train(earlier, tmp_path):
    words = [*earlier, *SEEDS, "--until", "prepare", *model_outside(tmp_path)]
    with pytest.raises(UserError, match="start.folder: all seeds would train into .*models/own"):
        run_ares.main(words)
    words[-1] += "{seed}"
    run_ares.main(words)
    for name in CONFIGS:
        run_ares.main(["--config", str(ROOT / "configs" / name), "--output", str(tmp_path), *SEEDS, "--dry_run"])


def test_a_refusal_of_a_later_seed_comes_before_the_first_ones_chain(earlier, tmp_path):
    for path in (tmp_path / "run/seed3").iterdir():
        stages._delete(path)
    with pytest.raises(UserError, match="seed4: stage prepare is finished, but its command had 1 and now has 2"):
        run_ares.main([*earlier, *SEEDS, "--until", "prepare", "--set", "prepare=[python -c 2]"])
    assert not list((tmp_path / "run/seed3").iterdir())
    with pytest.raises(UserError, match="--from: start is not finished"):
        run_ares.main([*earlier, *SEEDS, "--from", "rl"])


def test_paths_of_a_configuration_are_the_projects_from_any_folder(earlier, tmp_path, monkeypatch, capsys, sample):
    """As the commands see them; --config and --output are the user's."""
    monkeypatch.chdir(tmp_path)
    data = os.path.relpath(sample / "ScienceQA/data", ROOT)
    changes = ["--set", f"data.data_root={data}", f"start.folder={os.path.relpath(tmp_path / 'models', ROOT)}"]
    (tmp_path / "models").mkdir()
    words = ["--config", "quick.yaml", "--output", "run"]
    run_ares.main([*words, "--plan", *changes])
    shown = capsys.readouterr().out
    assert re.search("^start +goes on ", shown, re.MULTILINE), shown
    assert "known once the data are there" not in shown
    assert os.getcwd() == str(tmp_path) and str(tmp_path / "run") in shown


def stages_of(folder: Path, rounds: int) -> list[Stage]:
    return run_ares.Run(Config(str(ROOT / "configs/demo.yaml"), []), folder, 0, rounds).stages()


def test_more_rounds_keep_the_first_one(tmp_path):
    once, twice = ({stage.name: stage for stage in stages_of(tmp_path, rounds)} for rounds in (1, 2))
    for name in ("rl", "generate", "correct", "sft"):
        assert once[name] == twice[name] and f"{name}_2" in twice
    words = shlex.split(twice["rl_2"].commands[0])
    assert words[words.index("--base_model_dir") + 1] == str(tmp_path / "sft")
    for name in ("lora", "judge", "results", "report", "table"):
        assert {"sft", "sft_2"} <= set(twice[name].uses)
        assert any("RL 2" in " ".join(shlex.split(each)) or "RL_2" in each for each in twice[name].commands)


# -- configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_command_of_a_configuration_has_known_flags(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_ares.main(["--config", f"configs/{name}", "--output", str(tmp_path / "a run"), "--dry_run", "--rounds", "2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    config, scripts = Config(f"configs/{name}", []), set()
    for line in lines:
        script, *words = from_script(shlex.split(line))
        scripts.add(script)
        known = config.flags.get(script)
        for word in words if known else ():
            assert not word.startswith("--") or word[2:] in known or word == "--phase", f"{script} {word}"
        assert ":/" not in line and "{" not in line
    assert {"main.py", "run_mm_cot_rl.py", "haiku.py", "run_mm_cot_lora.py", "tools/compare.py"} <= scripts
    rl = [shlex.split(line) for line in lines if "run_mm_cot_rl.py" in line]
    model = [words[words.index("--base_model_dir") + 1] for words in rl]
    reference = [words[words.index("--ref_model") + 1] for words in rl]
    assert len(rl) == 2 and model[1].endswith("sft") and reference == [model[0]] * 2


FAULTS = {
    "rll: {lr: 1}": r"rll: no such block \(meant: rl\?\)",
    "rl: {lrr: 1}": r"rl.lrr: run_mm_cot_rl.py has no flag --lrr \(meant: lr\?\)",
    "rl: [1]": "rl: not a block of flags",
    "extends: absent.yaml": "absent.yaml",
    "- 1": "must hold",
    "extends: mine.yaml": "mine.yaml: it extends .*mine.yaml, which extends it",
    "extends: other.yaml": "it extends .*mine.yaml, which extends it",
    "rl: {1: 2}": "rl.1: run_mm_cot_rl.py has no flag --1",
    "sft: 3": "sft: not a block of flags",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_wrong_configuration_is_one_line(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("extends: mine.yaml")
    with pytest.raises(UserError, match=FAULTS[text]):
        Config(str(tmp_path / "mine.yaml"), [])


def test_several_rounds_of_rl_need_their_teacher_beside_them():
    demo = str(ROOT / "configs/demo.yaml")
    with pytest.raises(UserError, match="rl.epochs: 4 rounds of RL need their Teacher beside them"):
        Config(demo, ["teacher_beside_rl=false"])
    Config(demo, ["teacher_beside_rl=false", "rl.epochs=1"])


@pytest.mark.parametrize(
    "change", ["rl", "rl=1", "rl.lr", "nothing.lr=1", "size.x=1", "rl.=1", "rl.lr=[1", "at_once.x=1"]
)
def test_a_wrong_set_is_one_line(change):
    with pytest.raises(UserError, match="--set"):
        Config(str(ROOT / "configs/demo.yaml"), [change])


VALUES = {
    "rl=null": "rl: null removes",
    "start=null": "start: null removes",
    "sft=null": "sft: null removes",
    "launch=accelerate launch": "launch: a command for some of start, rl",
    "launch=[accelerate launch]": "launch: a command for",
    "launch={RL: accelerate launch}": "launch: a command for",
    "launch.rl=5": "launch: a command for",
    "launch.rl=sh '": "launch: a command for",
    "rl.epochs=abc": "rl.epochs: invalid int value: 'abc'",
    "rl.k_actions=2.5": "rl.k_actions: invalid int value: '2.5'",
    "rl.algo=dpo": "rl.algo: invalid choice: 'dpo'",
    "rl.lr=[1, 2]": "rl.lr: takes 1 value, not 2",
    "rl.lr=[]": "rl.lr: a text or a number",
    "teacher.price=[1]": "teacher.price: takes 2 values, not 1",
    'teacher.body={"temperature": null}': "teacher.body: a text or a number.*quotes",
    "report.title=2026-11-27": "report.title: a text or a number.*quotes",
    "lora.epoch=many": "lora.epoch: invalid int value",
    "judge.questions=all": "judge.questions: invalid int value",
    "prompt.use_caption=0": "prompt.use_caption: true or false, not 0",
    "generate.final_eval=[true]": "generate.final_eval: true or false",
    "rl.offload=yes please": "rl.offload: true or false",
    "forms=QCM-A": "forms: a list, as .QCM-A.",
    "forms=[QCM-B]": "forms: a list",
    "forms=[QCM-A, QCM-A]": "forms: a list",
    "forms=[]": "forms: a list",
    "published=foo": "published: one of none, scienceqa, aokvqa",
    "published=null": "published: one of",
    "size=huge": "size: one of tiny, base, large",
    "at_once=two": "at_once: a whole number",
    "at_once=0": "at_once: a whole number",
    "at_once=true": "at_once: a whole number",
    "teacher_beside_rl=1": "teacher_beside_rl: true or false",
    "prepare=python -c 1": "prepare: a list of commands",
    "prepare=[1]": "prepare: a list of commands",
    "rl.overwrite=true": "rl.overwrite: .* use --redo STAGE or --fresh",
    "features.overwrite=true": "features.overwrite: .* use --redo STAGE or --fresh",
    "rl.overwrite=false": None,
    "start.folder=models": None,
    "rl.lr=-x": "rl.lr: expected one argument",
    "report.splits=[test, --seed, 7]": "report.splits: values, not flags",
    "rl.seed=7": "rl.seed: .* sets --seed",
    "rl.ref_model=other": "rl.ref_model: .* sets --ref_model",
    "rl.phase=collect": "rl.phase: .* sets --phase",
    "data.seed=7": "data.seed: .* sets --seed",
    "sft.model=other": "sft.model: .* sets --model",
    "lora.prompt_format=QCM-A": "lora.prompt_format: .* sets --prompt_format",
    "scores.watch=2": "scores.watch: .* sets --watch",
    "judge.output=here": "judge.output: .* sets --output",
    "report.stage=a=b": "report.stage: .* sets --stage",
    "features.seed=null": None,
    "teacher=null": None,
    "sft.prompt_format=QCM-LE": None,
    "generate.final_eval=false": None,
    "report.splits=[test]": None,
}


@pytest.mark.parametrize("look", ["--dry_run", "--plan"])
@pytest.mark.parametrize("change", VALUES)
def test_a_value_that_no_stage_takes_is_one_line(change, look, tmp_path):
    words = ["--config", str(ROOT / "configs/demo.yaml"), "--output", str(tmp_path), look, "--set", change]
    if VALUES[change] is None:
        return run_ares.main(words)
    with pytest.raises(UserError, match=VALUES[change]) as error:
        run_ares.main(words)
    assert "\n" not in str(error.value)


FLAGS = {  # --set -> the fault; those that need torch to be seen are for a run only
    "teacher.batch=true": "stage rl: haiku.py: --batch and --watch do not go together",
    "teacher.body='{'": "stage rl: haiku.py: --body: '{' is no JSON",
    "teacher.max_usd=0": "--max_usd must be a number above 0",
    "rl.gamma=1.5": "stage rl: run_mm_cot_rl.py: --gamma must be between 0 and 1",
    "rl.algo=rloo rl.do_sample=false": "--algo rloo compares",
    "judge.questions=0": "stage judge: tools/win_rate.py: --questions must be at least 1",
    "sft.max_tokens=4096": "stage sft: main.py: --bs and --max_tokens both set the batch",
    "lora.lora_dropout=1": "stage lora: run_mm_cot_lora.py: --lora_dropout must be in",
    "prompt.img_type=null": "--vision_features: no effect without --img_type",
    "launch.sft=no-such-launcher": "stage sft: no-such-launcher: cannot be started",
    "teacher.teacher=claude": "stage rl: haiku.py: .*ANTHROPIC_API_KEY is not set",
    "teacher.teacher=openai teacher.teacher_model=x": "stage rl: haiku.py: .*OPENAI_API_KEY is not set",
}
LOOKS = ("--batch", "--body", "--max_usd", "--gamma", "--algo", "--questions")  # of which --dry_run speaks, too


@pytest.mark.parametrize("changes", FLAGS)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(changes, tmp_path, monkeypatch):
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    paid = ["teacher.teacher=claude", "scores=null"] if "teacher." in changes else []
    changes = ["rl.vf_lr=null", "rl.value_warmup=null", "rl.value_init=null", *paid, *changes.split(" ")]
    words = ["--config", str(ROOT / "configs/smoke.yaml"), "--output", str(tmp_path), "--set", *changes]
    fault = FLAGS[" ".join(changes[3 + len(paid) :])]
    if any(flag in fault for flag in LOOKS):
        with pytest.raises(UserError, match=fault):
            run_ares.main([*words, "--dry_run"])
    elif "_API_KEY" in fault:
        run_ares.main([*words, "--dry_run"])
    with pytest.raises(UserError, match=fault):
        run_ares.main(words)
    assert not list(tmp_path.iterdir())
    if fault.startswith("stage"):  # a stage that is not to run is not checked
        run_ares.main([*words, "--until", "check", "--dry_run"])


@pytest.mark.parametrize("changes, last, factor", [
    ([], "2", 3 * 4 * 10), (["rl.epochs=2"], "1", 2 * 4 * 10), (["rl.rl_epochs=null"], "2", 3 * 4 * 3),
    (["rl.k_actions=null", "rl.epochs=1"], "0", 3 * 10),
])  # fmt: skip
def test_a_flag_that_is_not_set_has_its_scripts_default(changes, last, factor, tmp_path, monkeypatch, sample):
    """Three rounds of RL: the third one's model is evaluated, and the plan counts them all."""
    monkeypatch.chdir(ROOT)
    changes = ["rl.epochs=null", f"data.data_root={sample / 'ScienceQA/data'}", *changes]
    config = Config("configs/scienceqa_base.yaml", changes)
    run = run_ares.Run(config, tmp_path, 0, 1)
    assert run.models(1)[1] == tmp_path / "rl" / last
    questions = len(plan.read_problems(run).splits["train"])
    assert plan.amounts(run)["rl"]["ppo"] == questions * factor


def test_a_launcher_beside_python_is_found_and_an_absent_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    chain = Chain(tmp_path)
    assert chain.not_found(Stage("rl", "RL", ["accelerate launch main.py"])) is None
    chain.run([Stage("rl", "RL", ["sh -c 'command -v accelerate'"])])
    bare = [
        sys.executable,
        "-S",
        "run_ares.py",
        "--config",
        "configs/demo.yaml",
        "--dry_run",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "No module named" in done.stderr and "source .venv/bin/activate" in done.stderr


def test_braces_of_a_value_stay(tmp_path, capsys):
    changes = [
        "report.title=a {x} {seed}",
        """teacher.body='{"temperature": null}'""",
        'prepare=["echo {y} {output}"]',
    ]
    words = ["--config", str(ROOT / "configs/scienceqa_base.yaml"), "--output", str(tmp_path), "--seed", "3"]
    run_ares.main([*words, "--dry_run", "--set", *changes])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert ["echo", "{y}", str(tmp_path)] in lines
    assert [words[words.index("--title") + 1] for words in lines if "--title" in words] == ["a {x} 3"]
    bodies = [words[words.index("--body") + 1] for words in lines if "--body" in words]
    assert bodies == ['{"temperature": null}'] * 4


def test_a_failure_of_the_pooled_tables_is_one_message(earlier, tmp_path):
    for seed in (3, 4):
        (tmp_path / f"run/seed{seed}/table.json").write_text("[1")
    with pytest.raises(UserError, match="(?s)stage tables ended with status 2: tools/compare.py.*table.json"):
        run_ares.main([*earlier, *SEEDS, "--until", "prepare"])


def test_a_launcher_with_an_open_quote_is_one_line():
    with pytest.raises(UserError, match="--launch: no command"):
        run_ares.parse_args(["--config", "configs/demo.yaml", "--launch", "accelerate 'launch"])


def test_configurations_extend_others_and_set_changes_them():
    large = Config(str(ROOT / "configs/scienceqa_large.yaml"), ["rl.lr=1e-6", "judge=null", "at_once=3"])
    assert large["rl"]["rl_batch_size"] == 2 and large["rl"]["k_actions"] == 4 and large["rl"]["lr"] == "1e-6"
    assert large["judge"] is None and large["at_once"] == 3 and large["size"] == "large"


# -- plan ------------------------------------------------------------------------------------------------


def test_the_plan_of_a_whole_data_set_says_hours_and_dollars(tmp_path, sample):
    """12,726 training questions: no model is loaded, nothing is asked, and the sums are those of its lines."""
    real = read(sample / "ScienceQA/data/scienceqa/problems.json")
    counts = {"train": 12_726, "val": 4_241, "test": 4_241}
    each = itertools.cycle(real.values())
    qids = iter(range(1, sum(counts.values()) + 1))
    splits = {split: [str(next(qids)) for _ in range(count)] for split, count in counts.items()}
    problems = {qid: {**next(each), "split": split} for split, ids in splits.items() for qid in ids}
    folder = tmp_path / "data/scienceqa"
    folder.mkdir(parents=True)
    files.write_json(folder / "problems.json", problems, indent=None)
    files.write_json(folder / "pid_splits.json", splits, indent=None)
    code = "import runpy, sys\nfor heavy in ('torch', 'transformers'): sys.modules[heavy] = None\n"
    code += "sys.argv = sys.argv[1:]\nrunpy.run_path('run_ares.py', run_name='__main__')"
    changes = [f"data.data_root={tmp_path / 'data'}", "size=tiny", "launch=null"]
    words = [*SCRIPT, "configs/scienceqa_base.yaml", "--output", tmp_path / "run", "--plan", "--set", *changes]
    environment = {name: value for name, value in os.environ.items() if name != "ANTHROPIC_API_KEY"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if "to run" in line[:24]}
    figures = {
        name: [float(word) for word in re.findall(r" (\d+\.\d\d)(?= )", line[:44])] for name, line in rows.items()
    }
    hours, dollars = figures["rl"]
    rate, _ = plan.seconds_per_unit("tiny")
    assert hours == pytest.approx(50_904 * (rate["rollout"] + 10 * rate["ppo"]) / 3600, abs=0.01)
    assert 3 < dollars < 7 and 1 < figures["correct"][0] < 4  # as --estimate says of the real questions
    total = re.search(r"in all +([\d.]+) +([\d.]+)", done.stdout)
    assert float(total[2]) == pytest.approx(dollars + figures["correct"][0] + figures["judge"][0], abs=0.02)
    assert "nothing is asked or spent" in done.stdout and not (tmp_path / "run/stages.json").exists()


# -- whole runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_at_its_smallest(tmp_path):
    output = tmp_path / "demo run"  # a blank in the path: users have them
    done = run_script(*SCRIPT, "configs/smoke.yaml", "--output", output)
    for model in ("models/start", "rl/1", "sft"):
        assert PREDICTIONS | {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(output / model))
    for number in (0, 1):
        items = handoff.iter_items(output / f"rl/questions_round{number}")
        assert {item.action for item in items} == {0, 1}
        assert all((item.folder / handoff.SCORES).exists() for item in items)
    assert len(handoff.iter_items(output / "corrections")) == 32
    table, text = read(output / "table.json"), (output / "table.md").read_text()
    assert text.strip() in done.stdout
    assert list(table["rationales"]) == ["start", "RL", "SFT"]
    assert list(table["adapters"]) == [
        f"{name}, {form}" for name in table["rationales"] for form in ("QCMG-A", "QCM-A")
    ]
    assert set(table["win_rates"]) == {"RL against start", "SFT against start"}
    for name, change in table["changes"].items():
        ours, theirs = name.split(" - ")
        for key in ("concludes", "covered"):
            want = table["rationales"][ours][key] - table["rationales"][theirs][key]
            assert change[key]["difference"] == pytest.approx(want)
    for row in table["answer_changes"].values():
        assert row["rationale"]["low"] <= row["rationale"]["difference"] <= row["rationale"]["high"]
    assert "tabular" in (output / "table.tex").read_text() and "sentence score" in (output / "results.md").read_text()
    check_report(output, table)

    again = run_script(*SCRIPT, "configs/smoke.yaml", "--output", output)
    assert again.stdout.count("done before") == len(read(output / "stages.json")["stages"]) == 13
    other = run_script(*SCRIPT, "configs/smoke.yaml", "--output", output, "--set", "sft.lr=1e-3", check=False)
    assert other.returncode == 2 and "stage sft is finished, but its command had 5e-4 and now has 1e-3" in other.stderr
    assert other.stderr.count("\n") == 1 and "--redo sft" in other.stderr
    one = run_script(*SCRIPT, "configs/smoke.yaml", "--output", output, "--only", "table", "--redo", "table")
    assert one.stdout.count("$ python") == 1 and read(output / "table.json") == table

    pooled = tmp_path / "pooled"  # two runs on the same questions: a question counts once
    run_script("tools/compare.py", "--runs", output, output, "--output", pooled)
    both = read(pooled / "table.json")["changes"]["SFT - start"]["score"]
    one = table["changes"]["SFT - start"]["score"]
    assert {name: both[name] for name in ("difference", "low", "high")} == pytest.approx(
        {name: one[name] for name in ("difference", "low", "high")}
    )
    assert "2 seeds" in (pooled / "table.md").read_text()


def check_report(output, table):
    """The report holds the table's numbers, every sample, the corrections and the images."""
    parts = parts_of((output / "report.html").read_text(encoding="utf-8"))
    figures = parts["main"]["overview"]["figures"]
    for data, figure in zip(table["rationales"].values(), figures, strict=False):
        assert figure["rationale"] == pytest.approx({name: data[name] for name in figure["rationale"]})
    for figure, name in zip(figures[3:], table["rationales"], strict=True):
        accuracy = table["adapters"][f"{name}, QCMG-A"]["accuracy"]
        assert figure["scores"]["acc_average"] == pytest.approx(accuracy, abs=0.01)
    samples = [each for many in parts["details"]["samples"].values() for each in many]
    assert len(samples) == 64 * len(parts["main"]["rounds"]) and len(parts["details"]["corrections"]) == 32
    assert parts["images"]["of"]
    # a model that learned nothing gives no answers that can be read; nothing else is to be noted
    assert [note for note in parts["main"]["notes"] if "could not be read" not in note] == []


@pytest.fixture
def real_run(tmp_path, sample, t5_tokenizer):
    """--set words that turn the paper's configuration into a small run on real questions with a T5 of 2 layers."""
    data = rl_tools.make_data(tmp_path, sample, 7)
    (data / "images").symlink_to(sample / "images")
    rl_tools.make_model(tmp_path / "start", data, t5_tokenizer)
    small = {
        "prepare": "null", "data.data_root": data, "prompt.caption_file": data / "captions.json",
        "prompt.vision_features": data / "vision_features", "start.folder": tmp_path / "start",
        "rationale.output_len": 24, "rl.bs": 4, "rl.rl_batch_size": 4, "rl.rl_epochs": 1, "rl.ga_step": 2,
        "rl.poll_seconds": 0.2, "rl.settle_seconds": 0.5, "rl.k_actions": 2, "rl.report_to": "none",
        "teacher.teacher": "reference", "scores.poll_seconds": 0.2, "sft.epoch": 1, "lora.epoch": 1,
        "lora.output_len": 8, "forms": "[QCM-A]", "launch": "{rl: env ACCELERATE_USE_CPU=true python -m "
        "torch.distributed.run --nproc_per_node 2}",
    }  # fmt: skip
    return [f"{name}={value}" for name, value in small.items()]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_papers_configuration_on_real_questions_killed_five_times(tmp_path, real_run):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [*SCRIPT, "configs/scienceqa_base.yaml", "--set", *real_run]
    run_script(*words, "--output", whole)
    recorded = list(read(whole / "stages.json")["stages"].items())
    rng, kills = random.Random(0), 0
    # in RL, in SFT, among the adapters, and anywhere
    places = ["rl", "sft", "lora", *(rng.choice(recorded)[0] for _ in range(2))]
    for place in sorted(places, key=[name for name, _ in recorded].index):
        process = subprocess.Popen(
            [sys.executable, *map(str, words), "--output", str(killed)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        timer = threading.Timer(rng.uniform(0, 0.8) * dict(recorded)[place]["seconds"], process.kill)
        for line in process.stdout:
            if line.startswith(f"== {place}:"):
                timer.start()
            elif timer.ident and line.startswith("== "):  # the stage took less time than before: kill in the next
                process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
        timer.cancel()
    run_script(*words, "--output", killed)
    assert kills >= 4  # the last stage has no next one
    assert (killed / "table.md").read_text() == (whole / "table.md").read_text()
    for model in ("rl/0", "sft"):
        ours, theirs = (read(run / model / "predictions_ans_test.json")["preds"] for run in (killed, whole))
        assert ours == theirs
    ours, theirs = (read(run / "table.json")["by_question"] for run in (killed, whole))
    assert ours.keys() == theirs.keys()
    for label in ours:
        assert all(np.array_equal(ours[label][key], theirs[label][key]) for key in theirs[label])
