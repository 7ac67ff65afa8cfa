"""A lack of GPU memory is found before the Teacher is paid and before the first epoch, by a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import main as sft_script
import run_mm_cot_lora as lora_script
import run_mm_cot_rl as rl_script
from ares.cli import UserError
from rl import memory, rollouts
from rl.trainer import PpoTrainer
from sft import trainer as sft_trainer
from tests.conftest import ROOT
from tests.rl import rl_tools
from tests.rl.rl_tools import arguments, flags, metrics_of, weights
from tests.tiny import make_data, make_model


@pytest.fixture(scope="module")
def world(rl_world):
    return rl_world


class Memory:
    """A GPU's memory, pretended: training passes of more than `tokens` decoder tokens do not fit; `seen` are all."""

    def __init__(self, tokens: float = float("inf")):
        self.tokens, self.seen = tokens, []

    def __enter__(self):
        def fill(module, args, kwargs, output):
            if getattr(module, "is_decoder", None) and hasattr(module, "embed_tokens") and torch.is_grad_enabled():
                self.seen.append(kwargs["input_ids"].numel())
                if self.seen[-1] > self.tokens:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        self.hook = torch.nn.modules.module.register_module_forward_hook(fill, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.hook.remove()


# -- RL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "more"), [(2, {}), (1, {"algo": "rloo"}), (1, {"pass_tokens": 500, "gradient_checkpointing": ""})]
)
def test_rl_gives_the_same_bits_after_a_dry_run(rounds, more, world, tmp_path, monkeypatch):
    """What is sampled, every logged number, weights and optimizer."""
    asked, dry_run = [], memory.dry_run
    monkeypatch.setattr(memory, "dry_run", lambda *how: asked.append(len(how[-1])) or dry_run(*how))
    for forced in (False, True):
        monkeypatch.setattr(memory, "wanted", lambda accelerator, forced=forced: forced)
        for number in range(rounds):
            rl_tools.Teacher(tmp_path / str(forced) / "questions")
            start = {} if number == 0 else {"base_model_dir": tmp_path / str(forced) / "0", "continue_train": True}
            start |= {"run_dir": tmp_path / str(forced)}
            rl_script.main(flags(world, tmp_path / str(forced), rl_epochs=1, **more | start))
        assert bool(asked) == forced
    assert asked == [6] * rounds  # rationales of the first batch, in each round
    one, two = (tmp_path / name for name in ("False", "True"))
    for number in range(rounds):
        rows, others = (rollouts.RolloutStore(run, number).load() for run in (one, two))
        assert all(torch.equal(getattr(rows, name), getattr(others, name)) for name in rollouts.FIELDS)
        if "algo" not in more:
            a, b = weights(one / str(number)), weights(two / str(number))
            assert all(torch.equal(a[name], b[name]) for name in a)
        a, b = (load_file(run / str(number) / "model.safetensors") for run in (one, two))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics_of(one, "update") == metrics_of(two, "update")


def ends_for_lack_of_memory(world, run, more, words, absent) -> None:
    """In one line, before anything is exported; the first batch is kept."""
    with Memory(tokens=10), pytest.raises(UserError) as error:
        rl_script.main(flags(world, run, **more))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert absent not in str(error.value)
    assert "\n" not in str(error.value) and error.value.status == 2
    assert len(list((run / "rollouts/round_0").glob("batch_*"))) == 1
    assert not list((run / "questions").rglob("*.txt"))


@pytest.mark.parametrize(
    ("more", "words", "absent"),
    [
        ({"gradient_checkpointing": ""}, ["--rl_batch_size below 2"], "--gradient_checkpointing or"),
        ({"pass_tokens": 1300}, ["--pass_tokens below 1300", "4 rationales"], "2 rationales"),
    ],
)
def test_rl_names_the_flags_that_need_less_memory(more, words, absent, world, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "wanted", lambda accelerator: True)
    ends_for_lack_of_memory(world, tmp_path / "run", more, words, absent)


def test_rl_goes_on_once_the_memory_suffices(world, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "wanted", lambda accelerator: True)
    run, words = tmp_path / "run", ["--gradient_checkpointing", "--rl_batch_size below 2"]
    for _ in range(2):  # a second attempt must not get past it because the first batch is on disk
        ends_for_lack_of_memory(world, run, {}, words, "--pass_tokens")
    kept = (run / "rollouts/round_0/batch_000000.safetensors").read_bytes()
    rl_script.main(flags(world, run, phase="collect"))
    assert (run / "rollouts/round_0/batch_000000.safetensors").read_bytes() == kept
    assert list((run / "questions").rglob("*.txt"))
    # and again on the machine that trains
    rl_tools.answer(run / "questions")
    with Memory(tokens=10), pytest.raises(UserError, match="does not fit"):
        rl_script.main(flags(world, run, phase="train"))
    assert not (run / "0").exists() and not list((run / "state").glob("*"))


def test_sampling_without_memory_ends_in_one_line(world, tmp_path, monkeypatch):
    def lacks(*how):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("rl.sampling.generate", lacks)
    with pytest.raises(UserError, match="^--bs: .* 3 x 2 rationales; lower it, or use --offload$"):
        rl_script.main(flags(world, tmp_path / "run"))


def test_the_pass_of_the_dry_run_is_as_large_as_any_of_the_round(world, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "wanted", lambda accelerator: True)
    tried, trained = [], []

    def watch(real, seen):
        def run(*how, **kwargs):
            with Memory() as passes:
                made = real(*how, **kwargs)
            seen.extend(passes.seen)
            return made

        return run

    monkeypatch.setattr(memory, "dry_run", watch(memory.dry_run, tried))
    monkeypatch.setattr(PpoTrainer, "train", watch(PpoTrainer.train, trained))
    rl_tools.Teacher(tmp_path / "run" / "questions")
    rl_script.main(flags(world, tmp_path / "run", bs=7, k_actions=3))
    assert max(tried) >= max(trained) > 0
    assert len(tried) == 2 * 2 * 2  # two updates of two passes of two models


@pytest.mark.parametrize(
    ("free", "more", "tokens"),
    [(80e9, {}, 8192), (4e9, {}, None), (80e9, {"algo": "rloo"}, 8192), (4e9, {"algo": "rloo"}, None)],
)
def test_tokens_of_a_pass_by_memory(free, more, tokens, monkeypatch):
    """Of the base model, 252 million parameters; more memory never means fewer tokens."""
    config = SimpleNamespace(d_model=768, num_layers=12, num_decoder_layers=12)
    info = SimpleNamespace(config=config, shapes={"w": (252, 10**6), "encoder.embed_tokens.weight": (10**9,)})
    args = arguments(**more)
    assert memory.default_pass_tokens(int(free), info, args) == tokens
    found = [memory.default_pass_tokens(int(gb * 1e9), info, args) or 0 for gb in range(4, 100)]
    assert found == sorted(found) and found[-1] == 8192 and all(n % 1024 == 0 for n in found)
    args.gradient_checkpointing = True
    assert all((memory.default_pass_tokens(int(gb * 1e9), info, args) or 0) >= n for gb, n in enumerate(found, 4))


def test_a_cpu_joins_no_minibatches_and_a_given_number_stays(world, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "default_pass_tokens", lambda free, info, args: 2048)
    for given, want in ((None, None), (300, 300)):
        run = tmp_path / str(given)
        rl_script.main(flags(world, run, phase="collect", pass_tokens=given))
        assert f"pass_tokens: {want or 'null'}" in (run / "args.yaml").read_text()


# -- SFT -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft_flags(sample, tmp_path_factory, t5_tokenizer_dir):
    tmp = tmp_path_factory.mktemp("sft")
    root = make_data(tmp / "data", sample, train=12, val=2, test=2)
    model = make_model(tmp / "model", patch_size=(5, 8))
    return [
        *("--data_root", str(root), "--img_type", "vit", "--model", str(model), "--tokenizer", str(t5_tokenizer_dir)),
        *("--lr", "0.003", "--input_len", "64", "--output_len", "16", "--epoch", "2", "--final_eval"),
    ]


KINDS = {"whole": (sft_script, ["--bs", "4"]), "tokens": (sft_script, ["--max_tokens", "300"]),
         "lora": (lora_script, ["--bs", "4", "--lora_dropout", "0.1"])}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sft_gives_the_same_bits_after_a_dry_run(kind, sft_flags, tmp_path, monkeypatch):
    script, more = KINDS[kind]
    seen = []
    dry_run = sft_trainer.dry_run

    def watched(trainer):
        with Memory() as passes:
            dry_run(trainer)
        seen.append(passes.seen)

    monkeypatch.setattr(sft_trainer, "dry_run", watched)
    for forced in (False, True):
        monkeypatch.setattr(sft_trainer, "dry_run_wanted", lambda trainer, forced=forced: forced)
        script.main([*sft_flags, *more, "--run_dir", str(tmp_path / str(forced))])
    (passes,) = seen
    assert len(passes) == 1  # one forward pass
    (name,) = {path.name for path in (tmp_path / "True").glob("*model.safetensors")}
    one, two = (load_file(tmp_path / forced / name) for forced in ("False", "True"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    states = [json.loads((tmp_path / forced / "trainer_state.json").read_text()) for forced in ("False", "True")]
    losses = [[entry.get("loss") for entry in state["log_history"]] for state in states]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", KINDS)
def test_sft_ends_before_the_first_step(kind, sft_flags, tmp_path, monkeypatch):
    script, more = KINDS[kind]
    monkeypatch.setattr(sft_trainer, "dry_run_wanted", lambda trainer: True)
    with Memory(tokens=10), pytest.raises(UserError, match="does not fit into this GPU's memory.*--bs.*--max_tokens"):
        script.main([*sft_flags, *more, "--run_dir", str(tmp_path / "run")])
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    if kind == "whole":
        script.main([*sft_flags, *more, "--run_dir", str(tmp_path / "run")])


def test_the_batch_of_the_dry_run_is_the_largest_of_all_epochs():
    sizes = torch.randint(5, 200, (41, 2), generator=torch.Generator().manual_seed(3)).tolist()
    for kind, size in ((sft_trainer.LengthGroupedBatches, 4), (sft_trainer.TokenBudgetBatches, 1000)):
        every, found = kind(sizes, size, 42), []
        items = [{"input_ids": [2] * prompt, "labels": [2] * target} for prompt, target in sizes]
        trainer = SimpleNamespace(
            args=SimpleNamespace(num_train_epochs=5.0), batches=kind(sizes, size, 42), train_dataset=items,
            data_collator=lambda items: items,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sft_trainer, "_forward_and_backward", lambda trainer, batch, found=found: found.append(batch)
            )
            sft_trainer.dry_run(trainer)
        costs = []
        for every.epoch in range(5):
            costs += [sft_trainer.padded_tokens(batch, sizes) for batch in every]
        longest = [max(len(item[name]) for item in found[0]) for name in ("input_ids", "labels")]
        assert len(found[0]) * sum(longest) == max(costs) and trainer.batches.epoch == 0


# -- the allocator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["main.py", "run_mm_cot_rl.py", "run_mm_cot_lora.py"])
def test_expandable_segments_are_asked_for_before_torch_is_imported(name):
    code = (
        "import os, sys, runpy\n"
        "from ares import launch\n"
        "use = launch.use_expandable_segments\n"
        "def asked():\n"
        "    assert 'torch' not in sys.modules\n"
        "    use()\n"
        "    raise SystemExit(' '.join(f'{k}={v}' for k, v in os.environ.items() if 'ALLOC_CONF' in k))\n"
        "launch.use_expandable_segments = asked\n"
        f"runpy.run_path({name!r}, run_name='__main__')\n"
    )
    env = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    for given in ({}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env | given, capture_output=True, text=True)
        name = "PYTORCH_ALLOC_CONF" if torch.__version__ >= "2.9" else "PYTORCH_CUDA_ALLOC_CONF"
        want = {name: "expandable_segments:True"} if not given else given
        assert done.stderr.split() == [f"{key}={value}" for key, value in want.items()], done.stderr
