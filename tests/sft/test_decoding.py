"""Greedy decoding gives the ids of the library's generate, whatever rows share a batch and however they end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import main
import run_mm_cot_lora
import run_mm_cot_rl
from ares import decoding
from ares.decoding import greedy
from benchmarks.endings import EndingPolicy
from model import MultimodalT5Config, T5ForMultimodalGeneration
from sft.predict import Predictor
from tools import predict

PATCHES = (3, 4)


@pytest.fixture(scope="module", params=[PATCHES, None], ids=["image", "text"])
def model(request):
    torch.manual_seed(1)
    config = MultimodalT5Config(
        vocab_size=12, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu", patch_size=request.param,
    )  # fmt: skip
    made = EndingPolicy(config).eval()  # an untrained model generates no `</s>`: this one ends at given lengths
    made.lengths = {tuple(row[row > 0].tolist()): 2 + i for i, row in enumerate(prompts(16)[0])}
    return made


def prompts(rows):
    draw = torch.Generator().manual_seed(2)
    mask = (torch.arange(9) < torch.randint(4, 10, (rows,), generator=draw)[:, None]).long()
    return torch.randint(2, 12, (rows, 9), generator=draw) * mask, mask


def batch(model, rows=16):
    input_ids, mask = (part[:rows] for part in prompts(16))
    made = {"input_ids": input_ids, "attention_mask": mask}
    if model.config.patch_size:
        made["image_ids"] = torch.randn(16, *PATCHES, generator=torch.Generator().manual_seed(3))[:rows]
    return made


def test_same_as_generate_with_rows_that_end_anywhere(model, monkeypatch):
    inputs = batch(model)
    expected = model.generate(**inputs, max_length=24, do_sample=False)
    uncached = model.generate(**inputs, max_length=24, do_sample=False, use_cache=False)  # as bench_eval's other side
    assert torch.equal(uncached, expected)
    widths = []
    step = decoding.StepDecoder.step
    monkeypatch.setattr(decoding.StepDecoder, "step", lambda self, ids: widths.append(len(ids)) or step(self, ids))
    with model.ending_greedy():
        ids = greedy(model, inputs, 24)
    assert torch.equal(ids, expected)
    assert (ids == 1).int().argmax(1).tolist() == list(range(2, 18)) and ids.shape == (16, 18)
    assert widths[0] == 16 and widths[-1] < 4  # finished rows are removed


def test_every_row_alone_gives_the_same(model):
    inputs = batch(model, rows=6)
    for i in range(6):
        with model.ending_greedy():
            row = greedy(model, inputs, 16)[i]
            alone = greedy(model, {name: tensor[i : i + 1] for name, tensor in inputs.items()}, 16)[0]
        assert torch.equal(row[: len(alone)], alone) and not row[len(alone) :].any()


class Recording(TorchDispatchMode):
    """A CUDA graph's stand-in on a CPU: `replay` repeats the recorded operations on the tensors that they had."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for old, one in zip(*((x if isinstance(x, tuple) else (x,)) for x in (out, new)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != one.data_ptr():
                    old.copy_(one)


def record_steps(monkeypatch):
    """Let decoding capture its steps as it does on a GPU; returns the recordings."""
    made = []

    class Decoder(decoding.StepDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.captures = self.static

        def _capture(self, tokens):
            self.tokens, self.graph = tokens.clone(), Recording()
            with self.graph:
                self.logits = self._logits(self.tokens)
            made.append(self.graph)

    monkeypatch.setattr(decoding, "StepDecoder", Decoder)
    return made


@pytest.mark.parametrize("how", ["fixed shapes", "recorded"])
def test_fixed_shapes_give_the_same_ids(model, how, monkeypatch):
    """Rows end anywhere, some are removed, and the cache's capacity of 4 is doubled three times."""
    inputs = batch(model)
    with model.ending_greedy():
        expected = greedy(model, inputs, 24)
    monkeypatch.setattr(decoding, "FIRST_LENGTH", 4)
    monkeypatch.setattr(decoding, "graph_mode", "on")
    recordings = record_steps(monkeypatch) if how == "recorded" else []
    with model.ending_greedy():
        ids = greedy(model, inputs, 24)
    assert torch.equal(ids, expected)
    if how == "recorded":  # every step but the first, which warms up
        assert 6 <= len(recordings) <= 8 and sum(one.replays for one in recordings) == ids.shape[1] - 2


def test_decoding_goes_on_if_no_graph_can_be_captured(model, monkeypatch, capsys):
    """This machine's PyTorch really refuses: it has no CUDA graphs."""
    if torch.cuda.is_available():
        pytest.skip("graphs can be captured here")
    inputs = batch(model)
    with model.ending_greedy():
        expected = greedy(model, inputs, 24)

    class Decoder(decoding.StepDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.captures = self.static

    monkeypatch.setattr(decoding, "StepDecoder", Decoder)
    monkeypatch.setattr(decoding, "graph_mode", "on")
    for _ in range(2):  # one note only
        with model.ending_greedy():
            assert torch.equal(greedy(model, inputs, 24), expected)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("note: decoding goes on without CUDA graphs")


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 3), (2, 5), (3, 1), (2, 2)])
def test_generate_with_a_decoder_of_another_depth(encoder, decoder):
    """The library's cache has a layer for each of the encoder's, which a deeper decoder overruns."""
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=encoder, num_decoder_layers=decoder, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, patch_size=PATCHES,
    )  # fmt: skip
    model = T5ForMultimodalGeneration(config).eval()
    inputs = batch(model, rows=4)
    ids = model.generate(**inputs, max_length=9, do_sample=False)
    assert len(ids) == len(model.generate(**inputs, max_length=9, num_beams=3)) == 4
    assert len(model.generate(**inputs, max_length=9, do_sample=True, num_return_sequences=2)) == 8
    assert torch.equal(greedy(model, inputs, 9)[:, : ids.shape[1]], ids)
    assert torch.equal(model.generate(**inputs, max_length=9, do_sample=False, use_cache=False), ids)


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_every_script_that_generates_sets_the_graph_mode(mode, model, tmp_path, monkeypatch):
    def seen(call):
        monkeypatch.setattr(decoding, "graph_mode", None)
        call()
        return decoding.graph_mode

    flag = ["--decode_graph", mode]
    for script in (main, run_mm_cot_lora):
        args = script.parse_args(["--model", "m", "--run_dir", str(tmp_path), *flag])
        assert seen(lambda args=args: Predictor(args, {}, None, None, torch.device("cpu"))) == mode
    args = predict.parse_args(["--model", "m", "--question", "Why?", "--choices", "a", "b", *flag])
    assert args.decode_graph == mode
    model.save_pretrained(tmp_path)
    args = run_mm_cot_rl.parse_args(["--base_model_dir", str(tmp_path), *flag])
    setup = SimpleNamespace(
        args=args, patch_size=model.config.patch_size, accelerator=SimpleNamespace(device=torch.device("cpu"))
    )
    assert seen(lambda: run_mm_cot_rl.load_model(setup, tmp_path)) == mode
