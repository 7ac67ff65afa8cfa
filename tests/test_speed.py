"""The fast code computes the same as the plain code; the helpers of the benchmarks work."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

import main
from ares import decoding, devices, layers
from ares.cli import UserError
from benchmarks.common import SIZES, check
from benchmarks.limits import Products, products, row_flops
from benchmarks.released_recipe import LoadedFeatures, padded_batch, plain_model
from model import (
    MultimodalT5Config,
    T5ForMultimodalGeneration,
    T5ForMultimodalGenerationValueFunction,
    choose_attention,
)
from rl import actor_critic, ppo
from sft.batching import LengthGroupedBatches, lengths
from tests.tiny import Launches, make_data, make_model
from utils_data import Collator, RationaleDataset, load_data


@pytest.fixture(scope="module")
def parts(tmp_path_factory, sample, t5_tokenizer):
    """Real questions, a small model, and loaders of both kinds."""
    root = make_data(tmp_path_factory.mktemp("data"), sample)
    args = main.parse_args(["--data_root", str(root), "--img_type", "vit", "--prompt_format", "QCM-E"])
    data = load_data(args, {"train": "train", "test": "test"})
    dataset = RationaleDataset(data.problems, data.qids["train"], t5_tokenizer, args)
    model = T5ForMultimodalGeneration.from_pretrained(
        make_model(tmp_path_factory.mktemp("model") / "m", patch_size=data.patch_size)
    ).eval()
    loaded = LoadedFeatures(data.features.path, data.features.name_map)
    return dataset, model, Collator(0, data.features), loaded


def test_batches_of_like_length_have_the_loss_and_gradient_of_padding_to_512(parts):
    """fp32; losses within 1e-5, gradients within 1e-5 of the largest."""
    dataset, model, collate, loaded = parts
    found, rows = [], 12
    targets = sum(len(labels) for labels in dataset.labels[:rows])
    for plain in (False, True):
        batches = LengthGroupedBatches(lengths(dataset)[:rows], 4, seed=1)
        order = list(range(rows)) if plain else [i for batch in batches for i in batch]
        other = T5ForMultimodalGeneration(model.config)
        other.load_state_dict(model.state_dict())
        other.eval()
        plain_model(other) if plain else choose_attention(other, torch.device("cpu"))
        total = 0.0
        for start in range(0, len(order), 4):
            items = [dataset[i] for i in order[start : start + 4]]
            if plain:
                real = sum(len(item["labels"]) for item in items)
                loss = other(**padded_batch(items, loaded)).loss * real / targets  # the library's mean
            else:
                loss = other(**collate(items), num_items_in_batch=targets).loss
            loss.backward()
            total += loss.item()
        found.append((total, torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None])))
    (ours, our_gradient), (theirs, their_gradient) = found
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert float((our_gradient - their_gradient).abs().max()) < 1e-5 * float(their_gradient.abs().max())


def test_the_fused_gelu_is_the_librarys_and_the_config_keeps_its_name(parts, tmp_path):
    model = parts[1]
    ours = model.encoder.block[0].layer[1].DenseReluDense.act
    x = torch.linspace(-9, 9, 4001)
    assert not isinstance(ours, type(ACT2FN["gelu_new"]))
    assert torch.allclose(ours(x), ACT2FN["gelu_new"](x), atol=2e-6)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["feed_forward_proj"], config["dense_act_fn"]) == ("gated-gelu", "gelu_new")


def test_a_benchmarks_check_refuses_unequal_sides():
    one, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    assert "equal within" in check("loss", one, one + 1e-6, 1e-5)
    for left, right in [(one, one * 1.1), (torch.ones(2), torch.ones(3)), ([1], [2]), (nan, one)]:
        with pytest.raises(UserError, match="differ"):
            check("loss", left, right, 1e-5)


def test_flops_of_a_row_are_those_that_torch_counts():
    config = MultimodalT5Config(
        vocab_size=1000, feed_forward_proj="gated-gelu", decoder_start_token_id=0, patch_size=(7, 16), **SIZES["tiny"]
    )
    model = T5ForMultimodalGeneration(config).eval()
    model.set_attn_implementation("eager")
    S, L = 31, 24
    batch = {"input_ids": torch.ones(1, S, dtype=torch.long), "image_ids": torch.zeros(1, 7, 16)}
    batch["decoder_input_ids"] = torch.ones(1, L, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch, use_cache=False)
    with torch.no_grad():
        seen = products(lambda: model(**batch, use_cache=False))
    # torch 2.11 leaves batched products out of its count: those of attention are compared with the formula alone
    by_torch = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    flat = Products()
    flat.seen = Counter({key: times for key, times in seen.seen.items() if len(key[0]) == 2})
    assert flat.flops() == by_torch
    # the formula counts the causal half of the decoder's attention, all of which runs
    causal = config.num_decoder_layers * 2 * L * L * config.num_heads * config.d_kv
    assert row_flops(model.config, S, L) + causal == pytest.approx(seen.flops(), rel=0.01)


# -- kernels ---------------------------------------------------------------------------------------------

ROWS, PROMPT, TEXT = 8, 16, 12


def deep(cls, layers=12, **changes):
    """A model of base depth; the number of operations does not depend on its width."""
    torch.manual_seed(0)
    config = MultimodalT5Config(**dict(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=layers, num_heads=2, dropout_rate=0.1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, patch_size=(5, 8), initializer_factor=0.3,
    ) | changes)  # fmt: skip
    return cls(config)


def ragged_prompt(rows):
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(PROMPT) < torch.randint(8, PROMPT + 1, (rows, 1), generator=g)).long()
    ids = torch.randint(2, 64, (rows, PROMPT), generator=g) * mask
    return {"input_ids": ids, "attention_mask": mask, "image_ids": torch.randn(rows, 5, 8, generator=g)}


def ragged_texts(rows):
    """Decoder ids (rows, TEXT + 1), start token first."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (rows, TEXT + 1), generator=g)
    ids[:, 0], ids[1:, 9:] = 0, 0
    return ids


@pytest.mark.parametrize("static", [False, True])
def test_operations_of_a_decode_step(static):
    policy, prompt = deep(T5ForMultimodalGeneration).eval(), ragged_prompt(64)
    policy.set_attn_implementation("sdpa")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder = decoding.StepDecoder(policy, policy.encode(**prompt)[0], prompt["attention_mask"], 4, static)
        decoder.step(torch.zeros(256, dtype=torch.long))
        with Launches() as counter:
            decoder.step(torch.zeros(256, dtype=torch.long))
    assert counter.seen.total() <= 360, counter.seen


def test_operations_of_a_ppo_pass():
    """Policy and value function, forward and backward, on 8 rows."""
    models = actor_critic.ActorCritic(
        deep(T5ForMultimodalGeneration).eval(), deep(T5ForMultimodalGenerationValueFunction).eval()
    )
    for model in models.children():
        model.set_attn_implementation("sdpa")
    actions, prompt = ragged_texts(ROWS), ragged_prompt(ROWS)
    mask = decoding.action_mask(actions)
    index = devices.flat_index(mask)
    minibatch = ppo.MiniBatch(*torch.randn(5, ROWS, TEXT))
    args = SimpleNamespace(clip_range=0.2, entropy_coef=0.0, vf_coef=1.0, vf_clip_range=None)
    with Launches() as counter:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = models(prompt, None, actions, index)
        loss, _ = ppo.ppo_loss(*outputs, minibatch, mask, args, int(mask.sum()))
        loss.backward()
    assert counter.seen.total() <= 5000, counter.seen


def test_operations_of_an_sft_step():
    model, texts = deep(T5ForMultimodalGeneration).train(), ragged_texts(ROWS)
    model.set_attn_implementation("sdpa")
    labels = texts[:, 1:].masked_fill(texts[:, 1:] == 0, -100)
    batch = {**ragged_prompt(ROWS), "labels": labels, "label_index": devices.flat_index(labels != -100)}
    with Launches() as counter:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, num_items_in_batch=torch.tensor(70)).loss
        loss.backward()
    assert counter.seen.total() <= 2700, counter.seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("masks", ["none", "padded", "decoder too"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_fused_layers_give_the_numbers_of_the_librarys(attention, masks, autocast):
    """fp32: states and gradients within 1e-5 of the largest; bf16: no farther from fp32 than the library's are."""
    found = {}
    for fused, low in ((False, False), (True, autocast), (False, autocast)):
        model = deep(T5ForMultimodalGeneration, layers=3).eval()
        assert {type(m) for m in model.modules()} >= set(layers.FUSED.values())
        if not fused:
            plain_model(model)
            assert not {type(m) for m in model.modules()} & set(layers.FUSED.values())
        model.set_attn_implementation(attention)
        batch, texts = ragged_prompt(4), ragged_texts(4)
        if masks == "none":
            batch["attention_mask"] = None
        if masks == "decoder too":
            batch["decoder_attention_mask"] = (torch.arange(TEXT + 1) < 10).expand(4, -1).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = model(**batch, decoder_input_ids=texts, use_cache=False).logits[:, :9].float()
        (logits.square().sum() + logits[:, 0].sum()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found[fused, low] = {"logits": logits.detach(), **grads}
    exact = found[False, False]
    for name, one in found[True, autocast].items():
        far = 3 * float((found[False, autocast][name] - exact[name]).abs().max()) if autocast else 0.0
        assert float((one - exact[name]).abs().max()) <= far + 1e-5 * float(exact[name].abs().max()), name


def test_the_fused_norm_has_the_right_gradient_and_half_precision_is_the_librarys():
    for cls in (layers.T5LayerNorm, layers.FusedNorm):
        norm = cls(7).double()
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
        if cls is layers.FusedNorm:
            assert torch.autograd.gradcheck(
                lambda x, w, norm=norm: layers._RmsNorm.apply(x, w, 1e-6), (x, norm.weight)
            )
    for dtype, of_x in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.half)):
        plain, norm = layers.T5LayerNorm(512).to(dtype), layers.FusedNorm(512).to(dtype)
        x = (300 * torch.randn(4, 512)).to(of_x)  # x^2 is beyond the range of half precision
        assert norm(x).isfinite().all() and torch.equal(norm(x), plain(x)) and norm(x).dtype == plain(x).dtype


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_training_step_drops_what_the_librarys_layers_drop(attention):
    """A run that an earlier version began goes on with the same numbers."""
    losses = []
    for fused in (True, False):
        model = deep(T5ForMultimodalGeneration, layers=3).train()
        if not fused:
            plain_model(model)
        model.set_attn_implementation(attention)
        torch.manual_seed(7)
        texts = ragged_texts(4)
        loss = model(**ragged_prompt(4), labels=texts.masked_fill(texts == 0, -100)).loss
        loss.backward()
        losses.append((loss.detach(), model.shared.weight.grad))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
