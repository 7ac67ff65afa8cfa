"""A GPU's paths, here on the CPU: what makes the host wait (one fetch per update of PPO, nothing in a decode step or
in a step of SFT), and the numbers, which are those of a CPU's paths."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import main as script
from ares import decoding, devices
from model import T5ForMultimodalGeneration
from rl import sampling
from sft import trainer as sft_trainer
from sft.lora import add_adapter
from sft.predict import Predictor
from tests.pretended_gpu import PretendedGPU
from tests.rl.rl_tools import SMALL_PATCHES, SMALL_VOCABULARY, make_trainer, small_models
from tests.tiny import make_data, make_model
from utils_data import Collator, RationaleDataset, load_data


def in_sdpa(*models):
    for model in models:
        model.set_attn_implementation("sdpa")
    return models


@pytest.mark.parametrize(
    "what",
    [
        lambda there, here: there.item(),
        lambda there, here: bool((there > 0).all()),
        lambda there, here: int(there),
        lambda there, here: there[None].tolist(),
        lambda there, here: there[None].cpu(),
        lambda there, here: there[None].numpy(),
        lambda there, here: torch.equal(there, there),
        lambda there, here: there[None].nonzero(),
        lambda there, here: there[None][there[None] > 0],
        lambda there, here: there[None].unique(),
        lambda there, here: here.to("cpu", non_blocking=True),
        lambda there, here: here.pin_memory().to("cpu"),
        lambda there, here: there + here,
        lambda there, here: there[None][here.long()],
        lambda there, here: torch.tensor([1.0], device="cpu"),
    ],
)
def test_the_pretended_gpu_sees(what, monkeypatch):
    there, here = torch.tensor(1.0), torch.zeros(1)
    with PretendedGPU(monkeypatch) as gpu:
        gpu.take(there)
        what(there, here)
        assert len(gpu.waits) == 1, gpu.waits
        gpu.waits.clear()
        there * 2 + torch.arange(3, device="cpu") + devices.to_device(here, "cpu") + 1
        assert gpu.waits == [] and here[here > 0].tolist() == []


def counting(gpu, function, waits):
    """`function`, appending the waits of each of its calls to `waits`."""

    def call(*how):
        gpu.waits.clear()
        made = function(*how)
        waits.append(list(gpu.waits))
        return made

    return call


UPDATES = [
    {}, {"algo": "rloo"}, {"max_grad_norm": 1.0, "entropy_coef": 0.1, "vf_clip_range": 0.2}, {"pass_tokens": 60},
    {"gradient_checkpointing": True}, {"value_warmup": 2},
]  # fmt: skip


@pytest.mark.parametrize("changes", UPDATES, ids=lambda changes: "-".join(changes) or "default")
def test_an_update_of_ppo_waits_once(changes, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, dtype=torch.float32, **changes)
    in_sdpa(*trainer.raw.children())
    trainer.save_state = lambda: None
    per_update, update = [], trainer._update
    with PretendedGPU(monkeypatch) as gpu:
        gpu.take(trainer.raw)

        trainer._update = counting(gpu, update, per_update)
        trainer.warm_up()
        after_warm_up = list(gpu.waits) if changes.get("value_warmup") else []
        trainer.train()
    assert len(per_update) == 3 * (2 + changes.get("value_warmup", 0))
    assert all(len(waits) == 1 and "tolist" in waits[0] for waits in per_update), per_update
    assert len(after_warm_up) <= 2, after_warm_up  # the last update's and that of all fitted values


@pytest.mark.parametrize("changes", UPDATES, ids=lambda changes: "-".join(changes) or "default")
def test_a_gpus_updates_have_the_numbers_of_a_cpus(changes, tmp_path, monkeypatch):
    """Padding to multiples of 8, inputs from a thread, one group: float64, weights within 1e-9 after two epochs."""
    found, widths = [], []
    for gpu in (False, True):
        folder = tmp_path / str(gpu)
        folder.mkdir()
        trainer, lines = make_trainer(folder, rl_epochs=2, **changes), []
        trainer.metrics.log = lambda kind, number, update, values, lines=lines, **place: lines.append(values)
        with PretendedGPU(monkeypatch) if gpu else contextlib.nullcontext():
            forward = trainer.raw.policy.decoder.forward
            trainer.raw.policy.decoder.forward = lambda *a, f=forward, **k: (
                widths.append(k["input_ids"].size(1)) or f(*a, **k)
            )
            trainer.warm_up()
            trainer.train()
            monkeypatch.undo()
        found.append((trainer.raw.state_dict(), lines))
        assert {width % devices.MULTIPLE for width in widths} == {0} or not gpu
        widths.clear()
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor, atol=1e-9, rtol=1e-9, msg=name)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-7, nan_ok=True)


def test_the_next_inputs_are_made_while_these_are_in_use(monkeypatch):
    made, go_on = [], threading.Event()

    def items():
        for i in range(3):
            made.append((i, threading.current_thread() is threading.main_thread()))
            yield i
            if i == 1:
                go_on.set()
        raise ValueError("the last one")

    assert next(feed := devices.ahead(items(), "cpu")) == 0 and made == [(0, True)]  # on a CPU nothing is made ahead
    feed.close()
    made.clear()
    PretendedGPU(monkeypatch)
    feed = devices.ahead(items(), "cpu")
    assert next(feed) == 0 and go_on.wait(0.3) is False and made == [(0, False), (1, False)]  # one, not two
    assert [next(feed), next(feed)] == [1, 2] and go_on.is_set()
    with pytest.raises(ValueError, match="the last one"):
        next(feed)


# -- sampling --------------------------------------------------------------------------------------------


@pytest.fixture
def prompt():
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(2, SMALL_VOCABULARY, (3, 8), generator=g), torch.ones(3, 8, dtype=torch.long)
    ids[1, 6:] = mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "image_ids": torch.randn(3, *SMALL_PATCHES, generator=g)}


def test_a_decode_step_does_not_wait(prompt, monkeypatch):
    """Nor does drawing; every 8th step finds the rows that have ended. A batch is scored without waiting, and then
    fetched."""
    policy, value = in_sdpa(*small_models(torch.float32))
    reference = copy.deepcopy(policy)
    models = sampling.Models(policy, reference, value)
    how = sampling.Sampling(k=4, do_sample=True, top_k=5, top_p=0.9, output_len=40)
    steps, step = [], decoding.StepDecoder.step
    with PretendedGPU(monkeypatch) as gpu:
        gpu.take(policy, reference, value)

        def counted(self, tokens):
            before = len(gpu.waits)
            logits = step(self, tokens)
            steps.append(len(gpu.waits) - before)
            return logits

        monkeypatch.setattr(decoding.StepDecoder, "step", counted)
        sampled = sampling.sample_batch(models, devices.to_device(prompt, "cpu"), how, seed=0)
    assert len(steps) > 8 and not any(steps), gpu.waits
    of_loop = [wait for wait in gpu.waits if "decoding.py" in wait]
    assert len(of_loop) <= 2 * (len(steps) // decoding.CHECK_STEPS), of_loop  # one to look, one to let rows go
    fetches = [wait for wait in gpu.waits if wait not in of_loop]
    assert fetches and all(wait.startswith("cpu at") and "sampling.py" in wait for wait in fetches), fetches
    assert sampled["actions"].shape == (12, len(steps) + 1)


def test_a_gpu_samples_what_a_cpu_samples(prompt, monkeypatch):
    """The same ids; numbers in fp32 within 1e-5. Prompts and rationales of multiples of 8 tokens."""
    policy, value = small_models(torch.float32)
    models = sampling.Models(policy, copy.deepcopy(policy), value)
    how, found = sampling.Sampling(k=4, do_sample=True, top_k=5, top_p=0.9, output_len=12), []
    for gpu in (False, True):
        with PretendedGPU(monkeypatch) if gpu else contextlib.nullcontext():
            found.append(sampling.sample_batch(models, devices.to_device(prompt, "cpu"), how, seed=0))
        monkeypatch.undo()
    assert torch.equal(found[0]["actions"], found[1]["actions"]) and found[0]["actions"].size(1) % 8
    for name in ("logprobs", "ref_logprobs", "values"):
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-5, rtol=0)


# -- fine-tuning -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(tmp_path_factory, sample, t5_tokenizer):
    """Data, tokenizer and the folder of a tiny model with image layers."""
    tmp = tmp_path_factory.mktemp("waits")
    root = make_data(tmp / "data", sample, train=8, val=2, test=6)
    argv = ["--data_root", str(root), "--img_type", "vit", "--prompt_format", "QCM-E", "--input_len", "60"]
    args = script.parse_args([*argv, "--output_len", "24", "--bs", "2", "--eval_bs", "3", "--final_eval"])
    data = load_data(args, {"train": "train", "val": "val", "test": "test"})
    splits = {name: RationaleDataset(data.problems, data.qids[name], t5_tokenizer, args) for name in data.qids}
    folder = make_model(tmp / "model", patch_size=data.patch_size)
    return SimpleNamespace(args=args, data=data, splits=splits, folder=folder, tokenizer=t5_tokenizer)


def sft_model(sft, lora: bool):
    model = T5ForMultimodalGeneration.from_pretrained(sft.folder)
    if lora:
        model = add_adapter(model, SimpleNamespace(lora_r=2, lora_alpha=4, lora_dropout=0.1, lora_bias="none"))
    model.set_attn_implementation("sdpa") if not lora else model.get_base_model().set_attn_implementation("sdpa")
    return model


def predictor_of(sft, bf16=False, **changes):
    args = SimpleNamespace(**vars(sft.args) | changes)
    collator = Collator(sft.tokenizer.pad_token_id, sft.data.features, device="cpu")
    return Predictor(args, sft.data.problems, sft.tokenizer, collator, torch.device("cpu"), bf16=bf16)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_an_sft_step_does_not_wait(lora, sft, tmp_path, monkeypatch):
    """Of the library's whole training loop; between two logs, where the loss is fetched."""
    training = sft_trainer.set_up(sft.args, tmp_path, len(sft.splits["train"]))
    training.logging_steps, training.save_strategy, training.max_steps = 4, "no", 8
    predictor = predictor_of(sft)
    trainer = sft_trainer.SFTTrainer(
        sft_model(sft, lora), training, predictor.collator, sft.splits["train"], None,
        processing_class=sft.tokenizer, evaluate_with=predictor.evaluate, save_minutes=0.0,
        ctrl_c=SimpleNamespace(pressed=False),
    )  # fmt: skip
    per_step = []

    class Count(sft_trainer.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            gpu.waits.clear()

        def on_step_end(self, *args, **kwargs):
            per_step.append(list(gpu.waits))

    trainer.add_callback(Count())
    with PretendedGPU(monkeypatch) as gpu:
        gpu.take(trainer.model)
        prepared, batches = trainer.get_batch_samples, []

        trainer.get_batch_samples = counting(gpu, prepared, batches)
        trainer.train()
    assert per_step == [[]] * 8 and batches == [[]] * 8, (per_step, batches)


@pytest.mark.parametrize("generate", [True, False], ids=["generated", "forced"])
def test_evaluation_waits_for_its_results_alone(generate, sft, monkeypatch):
    """One fetch for each batch; generation besides looks every 8th step for rows that have ended."""
    predictor, model = predictor_of(sft, use_generate=generate), sft_model(sft, False).eval()
    with PretendedGPU(monkeypatch) as gpu:
        gpu.take(model)
        predictor.predict(model, sft.splits["test"], "test")
    of_loop = [wait for wait in gpu.waits if "decoding.py" in wait]
    assert len(of_loop) <= 2 * 2 * (24 // decoding.CHECK_STEPS)
    assert [wait.partition(" ")[0] for wait in gpu.waits if wait not in of_loop] == ["tolist"] * 2


class WeightCasts(TorchDispatchMode):
    """Counts how often each weight is cast to half precision."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_to_copy" and args[0].data_ptr() in self.names:
            self.seen[self.names[args[0].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("generate", [True, False], ids=["generated", "forced"])
@pytest.mark.parametrize("kind", ["whole", "frozen", "lora", "adapter that is only loaded"])
def test_a_batch_of_predictions_casts_each_weight_once(kind, generate, sft):
    """bf16: autocast keeps the casts of what requires a gradient only, so frozen weights were cast at every step."""
    model = sft_model(sft, "lora" in kind or "adapter" in kind).eval()
    if kind in ("frozen", "adapter that is only loaded"):
        model.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(before.values()) == (kind == "whole")
    predictor, casts = predictor_of(sft, bf16=True, use_generate=generate), WeightCasts(model)
    with casts:
        predictor._predict_batch(model, [sft.splits["test"][i] for i in range(3)])
    assert len(casts.seen) > 20 and set(casts.seen.values()) == {1}, casts.seen.most_common(3)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_lengths_of_a_gpu_change_no_loss_and_no_gradient(lora, sft, monkeypatch):
    """Multiples of 8, and labels found before the copy: fp32, gradients within 1e-5 of their norm."""
    model, items, found = sft_model(sft, lora).eval(), [sft.splits["train"][i] for i in range(3)], []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for gpus in (("cuda",), ("cuda", "cpu")):
        monkeypatch.setattr(devices, "GPUS", gpus)
        batch = Collator(0, sft.data.features, device="cpu")(items)
        sizes = [batch[name].size(1) % devices.MULTIPLE for name in ("input_ids", "attention_mask", "labels")]
        assert (sizes == [0, 0, 0]) == (len(gpus) == 2)
        monkeypatch.setattr(devices, "GPUS", ("cuda",))
        index = devices.flat_index(batch["labels"] != -100)
        loss = model(**batch, num_items_in_batch=torch.tensor(50), label_index=index).loss
        assert torch.equal(loss, model(**batch, num_items_in_batch=torch.tensor(50)).loss)
        found.append((loss, torch.autograd.grad(loss, trained.values(), allow_unused=True)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-6)
    for name, one, two in zip(trained, found[0][1], found[1][1], strict=True):
        assert (one is None) == (two is None)
        assert one is None or (one - two).norm() <= 1e-5 * one.norm() + 1e-7, name
