"""Greedy decoding gives the ids of the library's generate, whatever rows share a batch and however they end."""

from __future__ import annotations

import contextlib
import copy
import functools
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
        self.calls, self.replays, self.given, self.fault, self.underway = [], 0, None, (None, None), False
        self.made.append(self)

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

    def capture_begin(self, pool, capture_error_mode):
        self.given = pool
        self.fault = self.faults.pop(self.made.index(self), self.fault)
        if self.fault[0]:
            raise self.fault[0]
        self.__enter__()
        self.underway = True

    def capture_end(self):
        self.__exit__(None, None, None)
        self.underway = False
        if self.fault[1]:
            raise self.fault[1]

    def reset(self):
        self.log.append("reset")

    def pool(self):
        return self.given


@pytest.fixture
def graphs(monkeypatch):
    """Decoding captures its steps here, as it does on a GPU: `made` graphs, the second of which keeps the pool, and
    the `log` of what follows a `faults[n]` (at the begin, at the end) of graph n."""
    found = SimpleNamespace(made=[], log=[], streams=[], faults={}, steps=[])

    class Decoder(decoding.StepDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.captures = self.static

        def _logits(self, tokens):
            captured = any(one.underway for one in found.made)
            found.steps.append((len(tokens), self.layers[0].keys.size(2), captured))
            return super()._logits(tokens)

    def stream():
        found.streams.append(SimpleNamespace(wait_stream=lambda other: None))
        return found.streams[-1]

    for name, value in {
        "CUDAGraph": type("Graph", (Recording,), vars(found)), "Stream": stream, "current_stream": lambda: None,
        "stream": lambda one: contextlib.nullcontext(), "current_device": lambda: 0,
        "graph_pool_handle": lambda: (0, len(found.made)), "empty_cache": lambda: found.log.append("empty_cache"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *how: found.log.append(how))
    monkeypatch.setattr(decoding, "_first_graph", functools.cache(decoding._first_graph.__wrapped__))
    monkeypatch.setattr(decoding, "StepDecoder", Decoder)
    monkeypatch.setattr(decoding, "FIRST_LENGTH", 4)
    monkeypatch.setattr(decoding, "graph_mode", "on")
    return found


def expected_ids(model, inputs):
    decoding.use_graphs("off")
    with model.ending_greedy():
        ids = greedy(model, inputs, 24)
    decoding.use_graphs("on")
    return ids


def test_fixed_shapes_give_the_same_ids(model, monkeypatch):
    """Rows end anywhere, some are removed, and the cache's capacity of 4 is doubled three times."""
    monkeypatch.setattr(decoding, "FIRST_LENGTH", 4)
    inputs = batch(model)
    monkeypatch.setattr(decoding, "graph_mode", "off")
    expected = expected_ids(model, inputs)
    with model.ending_greedy():
        assert torch.equal(greedy(model, inputs, 24), expected)


def test_recorded_steps_give_the_same_ids(model, graphs):
    """As above; the first step of each shape runs as it is, the second is captured, the others are replayed. All
    captures use one stream and one memory pool, in later batches too."""
    inputs = batch(model)
    expected = expected_ids(model, inputs)
    for _ in range(2):
        graphs.steps.clear()
        before = len(graphs.made)
        with model.ending_greedy():
            ids = greedy(model, inputs, 24)
        assert torch.equal(ids, expected)
        captured = [step for step in graphs.steps if step[2]]
        assert len(captured) == 4 == len(graphs.made) - before - (before == 0)
        for (*before_it, earlier), (*shape, now) in zip(graphs.steps, graphs.steps[1:], strict=False):
            assert not now or (before_it == shape and not earlier), "not warmed up in these shapes"
        plain = len(graphs.steps) - len(captured)
        assert sum(one.replays for one in graphs.made[before:]) == ids.shape[1] - 1 - plain
    assert len(graphs.streams) == 1 and {one.given for one in graphs.made} == {POOL}
    assert graphs.made[1].replays == 0 and graphs.log == []


POOL = (0, 2)  # the pretended handle that the second graph made takes: it keeps the pool
FULL, INVALID = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("operation failed due to a previous error")


@pytest.mark.parametrize(
    ("faults", "log", "mode"),
    [
        ({2: (FULL, None)}, ["reset", (0, POOL), "empty_cache"], "on"),
        ({1: (FULL, None)}, ["reset", (0, POOL), "empty_cache"], "on"),
        ({3: (None, FULL)}, ["reset", (0, POOL), "empty_cache"], "on"),
        ({2: (FULL, None), 3: (FULL, None)}, ["reset", (0, POOL), "empty_cache", "reset", (0, POOL)], "off"),
        ({2: (None, INVALID)}, ["reset", (0, POOL)], "off"),
        ({0: (INVALID, None)}, ["reset", (0, POOL)], "off"),
    ],
)
def test_a_failed_capture_is_cleaned_up_and_tried_again_after_a_lack_of_memory(
    faults, log, mode, model, graphs, capsys
):
    inputs = batch(model)
    expected = expected_ids(model, inputs)
    graphs.faults.update(faults)
    for _ in range(2):
        with model.ending_greedy():
            assert torch.equal(greedy(model, inputs, 24), expected)
    assert graphs.log == log and decoding.graph_mode == mode and not graphs.faults
    notes = [line for line in capsys.readouterr().out.splitlines() if "without CUDA graphs" in line]
    assert len(notes) == (mode == "off")


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


@pytest.mark.gpu
def test_graphs_on_a_gpu_give_the_same_ids_and_hold_no_more_memory_in_later_batches(model, monkeypatch):
    """fp32, and every capture succeeds: a failed one would turn graphs off for the process."""
    monkeypatch.setattr(decoding, "FIRST_LENGTH", 4)
    monkeypatch.setattr(decoding, "graph_mode", "off")
    there = copy.deepcopy(model).cuda()
    inputs = {name: tensor.cuda() for name, tensor in batch(model).items()}
    expected, reserved = expected_ids(there, inputs), {}
    captures, capture = [], decoding.StepDecoder._capture
    monkeypatch.setattr(decoding.StepDecoder, "_capture", lambda *how: captures.append(1) or capture(*how))
    for number in range(1, 51):
        with there.ending_greedy():
            ids = greedy(there, inputs, 24)
        assert torch.equal(ids, expected) and decoding.graph_mode == "on"
        reserved[number] = torch.cuda.memory_reserved()
    assert len(captures) >= 50 * 3, "the shapes change several times in each batch"
    assert reserved[50] == reserved[5], reserved


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
