"""benchmarks/gpu.sh without a GPU: the dry run goes through, a failing section stops nothing, a table is made."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

from ares import decoding
from ares.cli import UserError
from benchmarks import bench_eval, bench_gpu, common, rl_common, rl_memory, table
from rl import sampling
from tests.conftest import ROOT
from tests.rl.rl_tools import small_models


def test_the_dry_run_goes_through(tmp_path):
    env = {**os.environ, "DEVICE": "cpu", "SIZE": "tiny", "OUT": str(tmp_path / "out"), "BUDGET": "560"}
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "out/table.md").read_text()
    assert "| step | bench_gpu | ok |" in text and "| step | memory | ok |" in text, text
    assert "FAILED" not in text and "TOO FAR" not in text, text
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert {line["section"] for line in lines} == {"machine", "agreement", "sampling", "PPO", "memory"}
    sampled = [line["name"] for line in lines if line["section"] in ("agreement", "sampling")]
    assert sampled[0] == "first batch", "timed before anything else is sampled"
    assert len(list((tmp_path / "out").iterdir())) <= 8, "a lent machine gives back eight files"


def test_a_failing_section_is_reported_and_the_next_one_runs(tmp_path):
    report = bench_gpu.Report(tmp_path, seconds=60)
    report.run("first", lambda report: 1 / 0)
    report.run("second", lambda report: report.add("value", 3))
    late = bench_gpu.Report(tmp_path, seconds=-1)
    late.run("third", lambda report: report.add("value", 4))
    lines = table.gpu_lines(tmp_path)[2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| first", "FAILED", "ZeroDivisionError"], ["| second", "value", "3"], ["| third", "skipped", "no time left"]
    ]  # fmt: skip


def test_a_capture_that_failed_is_reported_not_timed_as_a_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "graph_mode", "auto")
    for fails in (False, True):
        generate = (lambda: decoding.use_graphs("off")) if fails else lambda: None
        bench = SimpleNamespace(lengths=torch.tensor([3, 5]), sample=lambda: None, generate=generate)
        report = bench_gpu.Report(tmp_path / str(fails), seconds=60)
        bench_gpu.sample_speed(report, argparse.Namespace(device="cpu"), bench)
        lines = map(json.loads, (tmp_path / str(fails) / "results.jsonl").read_text().splitlines())
        failed = [line["name"] for line in lines if line["value"] == "FAILED"]
        assert failed == ["generation, --decode_graph on"] * fails


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("device", "others", "fine"), [("cpu", 0, True), ("cpu", 1, False), ("cuda", 1, True), ("cuda", 3, False)]
)
def test_generation_is_compared_in_fp32_and_timed_as_asked(device, others, fine, bf16):
    """On a GPU an eighth of the texts may go apart, on a CPU none."""
    seen, predictor = [], SimpleNamespace(bf16=bf16)

    class Sides:
        released_ids = [[n, 1] for n in range(16)]
        our_ids = [[n + 9 * (n < others), 1] for n in range(16)]
        dataset = None

        def ours(self):
            seen.append(predictor.bf16)

        def released(self):
            return {"bleu": 0.5}

        def library_ids(self):
            seen.append(predictor.bf16)
            return self.our_ids

        def our_greedy_ids(self):
            return self.our_ids

        def our_scores(self, dataset, ids):
            assert ids == self.released_ids
            return {"bleu": 0.5}

    sides = Sides()
    sides.device, sides.predictor = torch.device(device), predictor
    if not fine:
        with pytest.raises(UserError, match=f"{others} of 16 differ"):
            bench_eval.checks(sides)
        return
    assert len(bench_eval.checks(sides)) == 3
    assert seen == [False, False, True][: 2 + bf16] and predictor.bf16 == bf16


def test_rollouts_are_timed_with_the_models_of_the_product():
    world = object.__new__(rl_common.World)
    policy, value = small_models(torch.float32)
    for device in ("cpu", "cuda"):
        world.device, world.models = torch.device(device), sampling.Models(policy, copy.deepcopy(policy), value)
        models = world.sampling_models()
        for one in (models.policy, models.reference, models.value_function):
            query = one.decoder.block[0].layer[0].SelfAttention.q.weight
            assert query.dtype == (torch.bfloat16 if device == "cuda" else torch.float32)
    assert {p.dtype for model in (policy, value) for p in model.parameters()} == {torch.float32}


def test_a_machine_without_git(monkeypatch):
    args = argparse.Namespace(device="cpu", threads=1)
    monkeypatch.setenv("PATH", "")
    assert common.machine(args)["commit"] is None


def test_a_gpus_results_fill_their_column_and_a_missing_stage_is_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "KEPT", tmp_path / "speed.json")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "RESULTS.md")
    spread = {"median": 12.5, "min": 12.0, "max": 13.0}
    result = {
        "stage": "SFT", "size": "base", "device": "cuda", "released": spread, "ours": spread, "ratio": spread,
        "peer": spread, "machine": {"gpu": "NVIDIA H100"}, "questions": "demo", "projection": {"seconds": 0.01},
    }  # fmt: skip
    folder = tmp_path / "gpu_out"
    folder.mkdir()
    (folder / "sft.json").write_text(json.dumps(result))
    table.main([str(folder), "--seconds", "300", "--only_print"])
    assert not (tmp_path / "RESULTS.md").exists()
    table.main([str(folder), "--seconds", "300"])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| SFT | not measured | >= 7x | **12.5x** (12-13) | >= 12x |" in text
    assert "| rollouts | not measured | >= 8x | not measured | >= 20x |" in text
    assert "gpu NVIDIA H100; the demo's questions" in text and text in capsys.readouterr().out


def test_live_tensors_are_counted_until_they_are_freed():
    """One linear layer under the script's autocast, byte by byte."""
    import torch.nn.functional as F

    with rl_memory.counting() as live:
        weight = torch.empty(100, 200, requires_grad=True)
        x = torch.empty(50, 200, requires_grad=True)
        assert live.now == 4 * (100 * 200 + 50 * 200)
        with rl_memory.Autocast():
            out = F.linear(x, weight)
        kept = 2 * (100 * 200 + 50 * 200 + 50 * 100)  # bf16: weight and input for the gradient, and the output
        assert live.now == 4 * (100 * 200 + 50 * 200) + kept
        out.float().sum().backward()
        del out
        assert live.now == 4 * 2 * (100 * 200 + 50 * 200), "weight, input and their gradients are left"
        assert live.peak > live.now


@pytest.mark.gpu
def test_the_computed_memory_is_what_a_gpu_needs():
    """Every stage at size tiny, within a tenth."""
    for name, stage in rl_memory.STAGES.items():
        computed = stage("tiny")[1]
        gc.collect(), torch.cuda.empty_cache()
        with rl_memory.on("cuda"):
            stage("tiny")  # takes cuBLAS's workspaces, 32 MiB for each stream on a Hopper, which stay
            measured = stage("tiny")[1]
        assert measured == pytest.approx(computed, rel=0.1), name
