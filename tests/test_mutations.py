"""Every input file of every script, damaged: it is accepted, or one line names it; never a traceback.

Seeded and bounded. The scripts run in this process from their entry points up to the place where a model is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml

import extract_caption
import extract_features
import haiku
import haiku_for_correction_feedback
import main
import preprocessing_for_correction_feedback
import run_mm_cot_lora
import run_mm_cot_rl
from ares import cli, files
from rl import metrics, rollouts, run_folder
from sft import run as sft_run
from teacher import budget, handoff
from teacher.batch_store import BatchStore, Record
from teacher.reply_files import ReplyCache
from tests.conftest import ROOT
from tests.tiny import PATCHES, make_data, make_model, write
from tests.tools import report_tools
from tools import doctor, predict, prepare_data, report, results, win_rate
from tools.report_page import plots

PARTS = int(os.environ.get("ARES_MUTATIONS", 7))
SEED = int(os.environ.get("ARES_MUTATION_SEED", 12))


# -- what can happen to a file -------------------------------------------------------------------------------


def of_place(path: Path, kind: str) -> None:
    """Something else than a file at `path`."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "link to /dev/zero":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path.name)


PLACES = ("folder", "FIFO", "link to /dev/zero", "link to itself")


def of_bytes(data: bytes, rng: random.Random) -> list[tuple[str, bytes]]:
    data = data or b"nothing yet\n"  # a lock
    at = rng.randrange(len(data))
    flipped = bytearray(data)
    for _ in range(3):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    early = bytearray(data)
    early[rng.randrange(min(64, len(early)))] ^= 1 << rng.randrange(8)
    return [
        ("empty", b""),
        ("cut in the middle", data[: len(data) // 2]),
        ("cut at the end", data[:-2]),
        ("bits flipped", bytes(flipped)),
        ("a bit flipped at the start", bytes(early)),
        ("zeros", b"\0" * len(data[:4096])),
        ("Latin-1", data[:at] + b"\xe9\xff" + data[at:]),
        ("deep", b"[" * 50_000),
    ]


def of_text(data: bytes) -> list[tuple[str, bytes]]:
    return [("byte order mark", b"\xef\xbb\xbf" + data), ("UTF-16", data.decode().encode("utf-16"))]


STRANGE = (
    None, True, -1, 0, 3.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "x" * 5000, "../../x", "a\0b",
    "\ud83d", "9" * 400, [], {}, [[]], {"x": {"y": []}}, [None], "Ωλ\u2028\x1b[31m",
)  # fmt: skip


def places_in(value, depth: int = 0):
    """(container, key) of every value in a JSON value, down to the fourth level; of long lists a few."""
    if depth < 5 and isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:6] + keys[-2:]:
            yield value, key
            yield from places_in(value[key], depth + 1)


def of_value(value, rng: random.Random, count: int) -> list[tuple[str, object]]:
    """The value with one part replaced, dropped or renamed, at every level in turn."""
    alls = rng.sample([None, [], {}, "x", 7], 2)
    found: list[tuple[str, object]] = [(f"all is {strange!r:.20}", strange) for strange in alls]
    for _ in range(count):
        changed = copy.deepcopy(value)
        spots = list(places_in(changed))
        if not spots:
            break
        holder, key = rng.choice(spots)
        way = rng.random()
        if way < 0.15 and isinstance(holder, dict):
            del holder[key]
        elif way < 0.25 and isinstance(holder, dict):
            holder[rng.choice(("x" * 5000, "../../x", "", "\udc00", "a\0b", "a b"))] = holder.pop(key)
        elif way < 0.3 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = rng.choice(STRANGE)
        found.append((f"{str(key)[:20]} changed", changed))
    return found


def deep(inner: str) -> str:
    return '{"a":' * 3000 + inner + "}" * 3000


def mutations(path: Path, name: str) -> list[tuple[str, bytes | None]]:
    """(what it is, content); None: what lies there is no file."""
    rng = random.Random(f"{SEED} {name}")
    data = path.read_bytes() or b"nothing yet\n"
    found: list[tuple[str, bytes | None]] = [(kind, None) for kind in PLACES] + of_bytes(data, rng)
    kind = path.suffix
    with contextlib.suppress(UnicodeDecodeError):
        found += of_text(data)
    if kind == ".json":
        found += [("deep inside", deep("1").encode()), ("huge number", b'{"a": ' + b"9" * 10_000 + b"}")]
        found += [(what, dump(value)) for what, value in of_value(json.loads(data), rng, PARTS)]
    elif kind == ".jsonl":
        lines = data.decode().splitlines()
        for what, value in of_value(json.loads(rng.choice(lines)), rng, PARTS):
            at = rng.randrange(len(lines))
            found.append((what, "\n".join([*lines[:at], dump(value).decode(), *lines[at + 1 :]]).encode()))
    elif kind == ".yaml":
        for what, value in of_value(yaml.safe_load(data), rng, PARTS):
            with contextlib.suppress(UnicodeEncodeError, yaml.YAMLError):
                found.append((what, yaml.safe_dump(value).encode()))
    else:
        found += [(f"cut at {part}", data[: len(data) * part // 10]) for part in (1, 3, 7, 9)]
        for number in range(4):
            spoilt = bytearray(data)
            at = rng.randrange(len(data))
            spoilt[at : at + 8] = rng.randbytes(8)
            found.append((f"noise {number}", bytes(spoilt)))
    assert len(found) >= 20
    return found


def read(path: Path):
    return json.loads(path.read_text())


def dump(value) -> bytes:
    return json.dumps(value).encode()  # NaN, Infinity and halves of characters as JSON writers let them pass


# -- a folder with everything that is read ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(tmp_path_factory, sample, t5_tokenizer):
    folder = tmp_path_factory.mktemp("clean")
    data = make_data(folder / "data", sample, train=6, val=2, test=4)
    problems, splits = (
        json.loads((data / f"scienceqa/{name}.json").read_text()) for name in ("problems", "pid_splits")
    )
    write(data / "captions.json", {qid: "A picture." for qid in problems})
    write(data / "scienceqa/correction.json", problems)
    model = make_model(folder / "model", patch_size=PATCHES)
    t5_tokenizer.save_pretrained(model)
    flags = {"prompt_format": "QCM-E", "img_type": "vit", "input_len": 64, "output_len": 16, "use_caption": True,
             "options": list("ABCDE"), "seed": 42, "data_root": "data", "bs": 4, "processes": 1, "kl_coef": 0.1,
             "reference": str(folder / "model"), "final_eval": False}  # fmt: skip
    files.write_args(model, SimpleNamespace(**flags))
    write(folder / "rationales.json", {"preds": ["One. Two."] * len(splits["train"]), "qids": splits["train"]})
    for name, split in (("test", "test"), ("eval", "val"), ("other", "test")):
        scores = {"answer": {"acc_average": "75.0"}, "rationale": {"rouge": 55.1, "similarity": 70.0}}
        told = {"preds": [f"Solution: {name} one."] * len(splits[split]), "qids": splits[split], "scores": scores,
                "labels": ["Solution: One."] * len(splits[split]), "num_fail": 0}  # fmt: skip
        write(folder / f"stage/predictions_ans_{name}.json", told)
    write(folder / "stage/trainer_state.json", {"log_history": [{"loss": 1.5}, {"train_runtime": 7.5}]})
    qid = splits["train"][0]
    item = handoff.question_dir(folder / "questions", 0, 0, qid)
    handoff.write_rationale(item, ["One.", "Two."])
    script("processing_sentence_level_feedback").main(
        ["--questions_dir", f"{folder}/questions", "--data_root", str(data)]
    )
    haiku.main(
        [
            "--teacher",
            "reference",
            "--keep_replies",
            "--questions_dir",
            f"{folder}/questions",
            "--data_root",
            str(data),
        ]
    )
    report_tools.picture(item / handoff.IMAGE)
    handoff.mark_exported(folder / "questions")
    handoff.mark_done(folder / "questions", 0)
    (item / handoff.REASON).write_text("wrong_count: 1 of 2\n")
    log = budget.Ledger(folder / "questions/teacher")
    log.settle(log.open("0/p0/1", 0.5), 0.1, "reply")
    log.close()
    record = Record("ab", 1, "claude-haiku-5-5", 1.0, 0.5, {"ab-0": {"item": f"0/p0/{qid}", "text": "0",
                    "attempt": 1, "failures": 0}}, "collected", "msgbatch_1")  # fmt: skip
    BatchStore(folder / "questions/teacher/batches").save(record)
    cache = ReplyCache(folder / "cache")
    cache.put("0" * 64, '{"One.": 1.0}', {"model": "x", "usage": {"input_tokens": 1}})
    cache.close()
    correction = ["--correction_dir", f"{folder}/correction", "--rationales", f"{folder}/rationales.json",
                  "--data_root", str(data)]  # fmt: skip
    preprocessing_for_correction_feedback.main(correction)
    haiku_for_correction_feedback.main(["--teacher", "reference", *correction, "--output", f"{folder}/c.json"])
    report_tools.make_rl(folder / "run", problems, splits["train"][:2], t5_tokenizer)
    files.write_json(folder / "run/rollouts/round_0/plan.json", {"k": 2, "prompts": "x", "batches": [splits["train"]]})
    files.write_json(folder / "run/rollouts/round_0/flags_sampling.json", {"seed": 42, "top_k": 50})
    files.write_json(folder / "win_rate.json", {
        "systems": ["a", "b"], "judge": {"model": "m"}, "protocol": "both",
        "verdicts": [{"qid": qid, "order": "ab", "winner": "a"}],
        "summary": {"rows": {"average": {"questions": 1, "win": 1.0, "tie": 2.0, "loss": 3.0, "win_rate": 1.0,
                    "win_rate_interval": [0.0, 1.0]}}, "position": {"first": 50.0}, "identical": 0},
    })  # fmt: skip
    files.write_json(folder / "times.json", {"stages": {"rl": {"title": "RL", "seconds": 1.5}}})
    (folder / "state").mkdir()
    checkpoint = folder / "sft/checkpoint-2"
    shutil.copytree(model, checkpoint)
    torch.save({"state": {0: {"step": torch.tensor(1.0)}}}, checkpoint / "optimizer.pt")
    write(checkpoint / "trainer_state.json", {"global_step": 2, "log_history": []})
    torch.save({"a": torch.ones(3)}, folder / "state/slot_0.pth")
    make_adapter(folder / "adapter", model)
    make_sources(folder, problems, splits, sample)
    write(
        folder / "images.json",
        {"captions": {"1": "A"}, "broken": [], "model": "m", "prompt": "", "max_new_tokens": 75},
    )
    return folder


def make_adapter(folder: Path, model: Path) -> None:
    from model import T5ForMultimodalGeneration

    args = run_mm_cot_lora.parse_args(["--model", str(model), "--lora_r", "2"])
    run_mm_cot_lora.add_adapter(T5ForMultimodalGeneration.from_pretrained(model), args).save_pretrained(folder)


def make_sources(folder: Path, problems: dict, splits: dict, sample: Path) -> None:
    """A-OKVQA's annotations, a folder of images with half-made captions and features."""
    rows = [{"question_id": f"q{number}", "question": "What?", "choices": list("abcd"), "correct_choice_idx": 1,
             "rationales": ["So.", "It is.", "Yes."], "image_id": 7, "direct_answers": ["b"],
             "difficult_direct_answer": False} for number in range(3)]  # fmt: skip
    for split in ("train", "val"):
        write(
            folder / f"aokvqa/aokvqa_v1p0_{split}.json",
            [{**row, "question_id": row["question_id"] + split} for row in rows],
        )
    for qid in ("46", "62"):
        shutil.copytree(sample / "images" / qid, folder / "images" / qid)
    extract_features.main(feature_flags(folder))


def feature_flags(folder: Path) -> list[str]:
    return ["--data_root", f"{folder}/images", "--output_dir", f"{folder}/made", "--img_type", "vit", "--model_name",
            "test_vit", "--random_weights", "--workers", "0"]  # fmt: skip


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "preprocessing_after_RL" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- every input file, and the launches that read it -------------------------------------------------------------


class Loaded(Exception):
    """A model would be loaded now: everything before was accepted."""


DATA = ("data/scienceqa/problems.json", "data/scienceqa/pid_splits.json")
ITEM = "questions/0/p0/*/"


def training(folder, *more):
    return ["--data_root", f"{folder}/data", "--caption_file", f"{folder}/data/captions.json", "--use_caption",
            "--img_type", "vit", "--run_dir", f"{folder}/new", *more]  # fmt: skip


def launch_main(folder):
    stage = f"{folder}/stage/predictions_ans_"
    main.main(training(folder, "--model", f"{folder}/model", "--prompt_format", "QCMG-A", "--epoch", "1",
                       "--correction", "True", "--correction_file", "scienceqa/correction.json", "--train_le",
                       f"{folder}/rationales.json", "--eval_le", f"{stage}eval.json", "--test_le",
                       f"{stage}test.json"))  # fmt: skip


def launch_rl(folder):
    run_mm_cot_rl.main(training(folder, "--base_model_dir", f"{folder}/model", "--prompt_format", "QCM-E"))


def launch_lora(folder):
    run_mm_cot_lora.main(["--data_root", f"{folder}/data", "--img_type", "vit", "--evaluate_dir",
                          f"{folder}/adapter", "--model", f"{folder}/model"])  # fmt: skip


def launch_predict(folder):
    qid = read(folder / "data/scienceqa/pid_splits.json")["test"][0]
    predict.main(["--model", f"{folder}/model", "--lora", f"{folder}/adapter", "--data_root", f"{folder}/data",
                  "--qid", qid])  # fmt: skip


def launch_haiku(folder):
    haiku.main(
        [
            "--teacher",
            "reference",
            "--keep_replies",
            "--questions_dir",
            f"{folder}/questions",
            "--data_root",
            f"{folder}/data",
        ]
    )


def launch_estimate(folder):
    haiku.main(["--estimate", "--keep_replies", "--questions_dir", f"{folder}/questions", "--data_root",
                f"{folder}/data", "--cache", f"{folder}/cache"])  # fmt: skip


def launch_preprocess(folder):
    script("processing_sentence_level_feedback").main(
        ["--questions_dir", f"{folder}/questions", "--data_root", f"{folder}/data"]
    )


def launch_correct(folder):
    flags = ["--correction_dir", f"{folder}/correction", "--rationales", f"{folder}/rationales.json", "--data_root",
             f"{folder}/data"]  # fmt: skip
    preprocessing_for_correction_feedback.main(flags)
    haiku_for_correction_feedback.main(["--teacher", "reference", *flags, "--output", f"{folder}/c.json"])


def launch_win_rate(folder):
    stage = f"{folder}/stage/predictions_ans_"
    win_rate.main([f"a={stage}test.json", f"b={stage}other.json", "--teacher", "reference",
                   "--data_root", f"{folder}/data", "--output", f"{folder}/judged"])  # fmt: skip


def launch_results(folder):
    results.main(["--system", f"a={folder}/stage/predictions_ans_test.json", "--win_rate", f"{folder}/win_rate.json",
                  "--data_root", f"{folder}/data"])  # fmt: skip


def launch_report(folder):
    report.main(["--stage", f"a={folder}/stage", "--run", f"{folder}/run", "--win_rate", f"{folder}/win_rate.json",
                 "--data_root", f"{folder}/data", "--correction_dir", f"{folder}/correction", "--output",
                 f"{folder}/report.html"])  # fmt: skip


def launch_times(folder):
    report.main(["--stage", f"a={folder}/stage", "--times", f"{folder}/times.json", "--output",
                 f"{folder}/report.html", "--data_root", f"{folder}/data"])  # fmt: skip


def launch_repeats(folder):
    script("remove_sentence").main(["--file_path", f"{folder}/rationales.json"])


def launch_doctor(folder):
    doctor.main(["--data_root", f"{folder}/data", "--img_type", "vit", "--model", f"{folder}/model",
                 "--caption_file", f"{folder}/data/captions.json"])  # fmt: skip


def launch_prepare(folder):
    prepare_data.main(["scienceqa", "--source", f"{folder}/data/scienceqa", "--output", f"{folder}/prepared"])


def launch_again(folder):
    prepare_data.main(["scienceqa", "--source", f"{folder}/data/scienceqa", "--output", f"{folder}/data"])


def launch_aokvqa(folder):
    prepare_data.main(["aokvqa", "--source", f"{folder}/aokvqa", "--output", f"{folder}/prepared"])


def launch_features(folder):
    extract_features.main(feature_flags(folder))


def launch_captions(folder):
    extract_caption.main(
        ["--data_root", f"{folder}/images", "--output", f"{folder}/images.json", "--model", "nowhere/m"]
    )


def launch_rl_state(folder):
    """What a restarted RL run reads of its own, without its models."""
    place = folder / "run/rollouts/round_0"
    store = rollouts.RolloutStore(folder / "run", 0)
    run_folder.refuse_changes(place / "flags_sampling.json", {"seed": 42, "top_k": 50})
    run_folder.reopen(place)
    splits = json.loads((folder / "data/scienceqa/pid_splits.json").read_text())
    prompts = SimpleNamespace(lengths=dict.fromkeys(splits["train"], 1), fingerprint=lambda: "x")
    store.plan(prompts, 4, 2)
    rows = store.load() if store.collected_file.exists() else None
    decision = rollouts.read_decision(store.scores_file)
    if rows is not None:
        rollouts.scored(rows, decision)
    metrics.Metrics(folder / "run", "none", {}).rewind(0, None)
    args = SimpleNamespace(
        target_kl=0.1, init_kl_coef=0.1, ref_model=None, continue_train=True, base_model_dir=folder / "model"
    )
    run_folder.kl_coefficient(args, folder / "model", False, 0.3)
    run_folder.reference_folder(args)


def launch_sft_state(folder):
    settings = {"bs": 4, "processes": 1, "final_eval": False, "seed": 42}
    sft_run.changed_settings(files.read_yaml(folder / "model/args.yaml", "--run_dir"), settings)
    sft_run.newest_undamaged([folder / "sft/checkpoint-2"])


def launch_optimizer(folder):
    from rl.optimizer import read_optimizer

    read_optimizer(folder / "state/slot_0.pth", [])


def launch_batches(folder):
    haiku.main(["--batch", "--keep_replies", "--questions_dir", f"{folder}/questions", "--base_url",
                "http://127.0.0.1:9", "--data_root", f"{folder}/data", "--no-cache"])  # fmt: skip


FILES: dict[Callable, tuple[str, ...]] = {
    launch_main: (*DATA, "data/captions.json", "data/scienceqa/correction.json", "data/vision_features/name_map.json",
                  "data/vision_features/vit.json", "data/vision_features/vit.npy", "model/config.json",
                  "model/model.safetensors", "model/generation_config.json", "model/tokenizer.json",
                  "model/tokenizer_config.json", "rationales.json", "stage/predictions_ans_eval.json",
                  "stage/predictions_ans_test.json"),
    launch_rl: (*DATA, "model/config.json"),
    launch_lora: ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    launch_predict: ("model/args.yaml", "model/config.json", "adapter/adapter_config.json"),
    launch_haiku: ("data/scienceqa/problems.json", *(f"{ITEM}{name}" for name in (
        "rationale_from_mm_cot.txt", "input_for_llm.txt", "output_from_llm.txt", "reply.json", "score.txt",
        "refused.txt", "image.png")), "questions/mmcot_finished_signal.txt"),
    launch_estimate: ("questions/teacher/spend.jsonl", "cache/replies.sqlite3", f"{ITEM}image.png"),
    launch_batches: ("questions/teacher/batches/ab.json", "questions/teacher/spend.jsonl"),
    launch_preprocess: (f"{ITEM}rationale_from_mm_cot.txt", f"{ITEM}input_for_llm.txt"),
    launch_correct: (*DATA, "rationales.json", "correction/0/p0/*/output_from_llm.txt",
                     "correction/0/p0/*/input_for_llm.txt"),
    launch_win_rate: ("stage/predictions_ans_test.json",),
    launch_results: ("stage/predictions_ans_test.json", "win_rate.json"),
    launch_report: ("stage/predictions_ans_test.json", "win_rate.json", "run/metrics.jsonl",
                    "run/samples_round_0.jsonl", "run/0/args.yaml",
                    "run/rollouts/round_0/scores.json", "stage/trainer_state.json",
                    "run/questions_round0/0/p0/*/reply.json"),
    launch_times: ("times.json",),
    launch_repeats: ("rationales.json",),
    launch_doctor: (*DATA, "data/vision_features/name_map.json", "data/captions.json"),
    launch_prepare: DATA,
    launch_again: DATA,
    launch_aokvqa: ("aokvqa/aokvqa_v1p0_train.json",),
    launch_features: ("made/name_map.json", "made/vit.json"),
    launch_captions: ("images.json",),
    launch_rl_state: ("run/rollouts/round_0/plan.json", "run/rollouts/round_0/flags_sampling.json",
                      "run/rollouts/round_0/collected.json", "run/rollouts/round_0/scores.json", "run/metrics.jsonl",
                      "model/args.yaml", "run/rollouts/round_0/batch_000000.safetensors"),
    launch_sft_state: ("model/args.yaml", "sft/checkpoint-2/trainer_state.json", "sft/checkpoint-2/optimizer.pt",
                       "sft/checkpoint-2/model.safetensors"),
    launch_optimizer: ("state/slot_0.pth",),
}  # fmt: skip
# what a launch writes to, so that it is laid out anew
WRITES = {launch_haiku: ("questions",), launch_estimate: ("questions", "cache"), launch_batches: ("questions",),
          launch_preprocess: ("questions",), launch_correct: ("correction", "c.json"), launch_win_rate: ("judged",),
          launch_report: ("run", "report.html"), launch_rl_state: ("run",), launch_prepare: ("prepared",),
          launch_aokvqa: ("prepared",), launch_again: ("data",), launch_features: ("made",),
          launch_main: ("new",), launch_rl: ("new",)}  # fmt: skip
CASES = [(launch, name) for launch, names in FILES.items() for name in names]


@pytest.fixture(scope="module")
def tokenizers():
    """Loading a tokenizer takes longer than all the rest."""
    return {}


@pytest.fixture
def place(clean, tmp_path, monkeypatch, api_environment, tokenizers, request):
    """The folder, in which no model is loaded, and a tokenizer once."""
    import model

    def loaded(cls, *args, **kwargs):
        raise Loaded

    for cls in (model.T5ForMultimodalGeneration, model.T5ForMultimodalGenerationValueFunction):
        monkeypatch.setattr(cls, "from_pretrained", classmethod(loaded))
    load = transformers.AutoTokenizer.from_pretrained
    if "tokenizer" not in request.node.name:

        def load_once(name, *args, **kwargs):
            if str(name) not in tokenizers:
                tokenizers[str(name)] = load(name, *args, **kwargs)
            return tokenizers[str(name)]

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load_once)
    monkeypatch.setattr(plots, "as_svg", lambda *about: "<svg></svg>")
    if "metrics" not in request.node.name:
        monkeypatch.setattr(report, "draw", lambda *about: {})  # half a second each
    monkeypatch.chdir(tmp_path)
    return clean


def lay_out_anew(kept: Path, folder: Path, names: Sequence[str]) -> None:
    """What a launch may have written, as it was before."""
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
        if (kept / name).is_dir():
            shutil.copytree(kept / name, folder / name)
        elif (kept / name).is_file():
            shutil.copy2(kept / name, folder / name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch, name", CASES, ids=[f"{launch.__name__[7:]}-{name}" for launch, name in CASES])
def test_a_damaged_file_is_accepted_or_named_in_one_line(launch, name, place, tmp_path, capsys):
    path = next(iter(sorted(place.glob(name))))
    kept, written = tmp_path / "kept", WRITES.get(launch, ())
    kept.mkdir()
    for each in written:
        if (place / each).exists():
            (shutil.copytree if (place / each).is_dir() else shutil.copy2)(place / each, kept / each)
    original, wrong = path.read_bytes(), []
    for what, content in mutations(path, name):
        if content is None:
            of_place(path, what)
        else:
            path.write_bytes(content)
        capsys.readouterr()
        fault = outcome(lambda: launch(place), path, capsys)
        if fault:
            wrong.append(f"{what}: {fault}")
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        lay_out_anew(kept, place, written)
        path.write_bytes(original)
    assert not wrong, "\n".join(wrong)


def outcome(launch: Callable, path: Path, capsys) -> str:
    """What is wrong with the way in which a launch ended; "" if nothing is."""
    try:
        cli.run(launch)
    except Loaded:
        return ""
    except SystemExit as end:
        out, said = capsys.readouterr()
        lines = [line for line in said.splitlines() if "error:" in line]
        if end.code == 1 and "checks failed" in said:  # doctor.py's way: a line for each fault
            lines = [line for line in out.splitlines() if "FAIL" in line]
        elif end.code == 2 and "cannot load nowhere/m" in said:
            return ""  # accepted
        elif end.code != 2:
            return f"exit {end.code}: {said[-300:]}"
        if len(lines) != 1:
            return f"{len(lines)} lines: {lines}"
        named = path.name in lines[0] or path.parent.name in lines[0]
        return "" if named and len(lines[0]) < 1500 else f"does not name the file: {lines[0][:500]}"
    except BaseException as error:
        import traceback

        where = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename][-1:]
        return f"{type(error).__name__}: {str(error)[:120]} at {where}"
    return ""
