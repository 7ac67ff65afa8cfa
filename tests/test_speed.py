"""The fast code computes the same as the plain code; the helpers of the benchmarks work."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

import main
from ares.cli import UserError
from benchmarks.common import SIZES, check
from benchmarks.limits import Products, products, row_flops
from benchmarks.released_recipe import LoadedFeatures, padded_batch, plain_model
from model import MultimodalT5Config, T5ForMultimodalGeneration, choose_attention
from sft.batching import LengthGroupedBatches, lengths
from tests.tiny import make_data, make_model
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
