"""Shared by the benchmarks: flags, models, real prompts, timing, checks of equality, one report per stage.

    args = common.parse(__doc__, argv, rows=(16, "test questions"))   # --size --device --repeats ... and --rows
    data = common.load(args)                                 # real questions, tokenizer, random features, a model
    result = common.compare(released, ours, args)            # interleaved; median ratio, min-max
    common.report(args, "sft", result, equal=[...], limit="62% of the time is bare matrix products")

Both sides of a comparison run in one process, on the same weights and threads. Questions and tokenizer are those of
the real sample in ../shared or $ARES_SHARED; without it the benchmarks make the demo's, and say so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ares import cli, files  # noqa: E402
from ares.cli import UserError, print0  # noqa: E402
from benchmarks.limits import seconds  # noqa: E402
from benchmarks.table import PEERS, SCORES, STAGES  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ARES_SHARED", ROOT.parent / "shared"))
SAMPLE = SHARED / "data/scienceqa_sample"
VOCABULARY = 32128  # rows of the embedding of every published T5, for the tokenizer's 32,100 pieces
VIT = (145, 1024)
SIZES = {
    "tiny": {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 4, "num_heads": 4},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
}
FEATURE_ROWS = 64  # rows of random features on disk; the questions with an image share them
DEMO_QUESTIONS = ("--train=500", "--val=60", "--test=300")


# -- flags and machine -----------------------------------------------------------------------------------


def parse(doc: str, argv: Sequence[str] | None, **own: tuple[Any, str]) -> argparse.Namespace:
    """The flags of every benchmark and `own` ones, name=(default, help); sets threads and seed. Raises UserError."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=cli.HelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="model size")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side")
    parser.add_argument("--profile", action="store_true", help="also print a torch profiler table of our side")
    parser.add_argument("--json", metavar="FILE", help="also write the result there, for run_all.sh")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order")
    for name, (default, text) in own.items():
        how = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name}", help=text, **how)
    args = parser.parse_args(argv)
    cli.refuse(
        [f"--{name} must be at least 1" for name in ("repeats", "threads") if getattr(args, name) < 1]
        + ["--device cuda: this torch finds no GPU"] * (args.device == "cuda" and not torch.cuda.is_available())
    )
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    print0(", ".join(f"{name} {value}" for name, value in machine(args).items() if value is not None))
    return args


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on besides the code: processor, GPU, threads, versions, commit."""
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    commit = None
    if shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = asked.stdout.strip() or None
    return {
        "cpu": cpu, "cores": os.cpu_count(), "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "device": args.device, "threads": args.threads, "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit,
    }  # fmt: skip


# -- questions and model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where questions and tokenizer are. `name`: sample (real ScienceQA) or demo."""

    name: str
    data_root: Path
    captions: Path
    images: Path
    tokenizer: Path


def find_source() -> Source:
    """The real sample, or where it is absent the demo's questions and tokenizer, made once in `cache_dir`."""
    demo = cache_dir() / "demo"
    if SAMPLE.is_dir():
        return Source("sample", SAMPLE / "ScienceQA/data", SAMPLE / "instruct_captions.json", SAMPLE / "images",
                      SHARED / "data/t5_tokenizer")  # fmt: skip
    cli.warn0(f"no real questions at {SAMPLE} (ARES_SHARED names the folder that holds data/): the demo's are used")
    if not (demo / "t5").is_dir():
        model = ["--data", demo, "--tokenizer", demo / "tokenizer", "--output", demo / "t5", "--d_model", "16"]
        for script, *argv in (["make_data.py", "--output", demo, *DEMO_QUESTIONS], ["make_model.py", *model]):
            subprocess.run([sys.executable, ROOT / "demo" / script, *argv], check=True, stdout=sys.stderr)
    return Source("demo", demo / "data", demo / "data/captions.json", demo / "images", demo / "tokenizer")


@dataclass
class BenchData:
    """Problems with captions, split -> question ids, the tokenizer, random ViT features."""

    args: argparse.Namespace  # the scripts' own flags (prompt_format, input_len, ...)
    problems: dict[str, Any]
    qids: dict[str, list[str]]
    tokenizer: Any
    features: Any  # VisionFeatures
    collator: Any
    model: Path  # a checkpoint folder (policy and tokenizer) of `build_model`; either class loads it

    def dataset(self, split: str, count: int | None = None) -> Any:
        """`RationaleDataset` of `count` questions, spread evenly over a split so that their lengths are its own."""
        qids = self.qids[split]
        count = len(qids) if count is None else count
        return self.of([qids[i * len(qids) // count % len(qids)] for i in range(count)])

    def of(self, qids: Sequence[str]) -> Any:
        """`RationaleDataset` of these questions."""
        from utils_data import RationaleDataset

        return RationaleDataset(self.problems, qids, self.tokenizer, self.args)


def load(args: argparse.Namespace) -> BenchData:
    """Questions with captions, as the users' commands read them (`--use_caption`), and a model of --size."""
    from utils_data import Collator, load_data, load_tokenizer

    source = find_source()
    features = cache_dir() / f"vision_features_{source.name}"
    _make_features(features, source)
    flags = sft_flags(
        *("--data_root", source.data_root, "--caption_file", source.captions, "--use_caption", "--img_type", "vit"),
        *("--vision_features", features, "--tokenizer", source.tokenizer, "--prompt_format", "QCM-E"),
        *("--output_len", 512, "--seed", args.seed),
    )
    data, tokenizer = load_data(flags, {"train": "train", "val": "val", "test": "test"}), load_tokenizer(flags)
    folder = cache_dir() / f"{args.size}_vit_seed{args.seed}_{source.name}"
    if not (folder / "config.json").exists():
        # beyond the demo's tokenizer ids have no text
        vocabulary = VOCABULARY if source.name == "sample" else len(tokenizer)
        with files.atomic_dir(folder) as temporary:
            build_model(args.size, vocabulary, args.seed, data.features.shape).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    collator = Collator(tokenizer.pad_token_id, data.features, device=args.device)
    return BenchData(flags, data.problems, data.qids, tokenizer, data.features, collator, folder)


def sft_flags(*argv: Any) -> argparse.Namespace:
    """The flags of main.py for `argv`."""
    from sft.run import add_sft_flags

    parser = argparse.ArgumentParser()
    cli.add_common_flags(parser, output_len=64, lr=5e-5)
    add_sft_flags(parser)
    return parser.parse_args(list(map(str, argv)))


def cache_dir() -> Path:
    """Folder of models, features and demo questions, kept between runs on this machine."""
    return files.writable_dir(Path(tempfile.gettempdir()) / f"ares_benchmarks_{os.getuid()}", "temporary folder")


def _make_features(folder: Path, source: Source) -> None:
    """Random ViT features of FEATURE_ROWS images, and a name map that gives a row to every question with an image."""
    if (folder / "name_map.json").exists():
        return
    problems = json.loads((source.data_root / "scienceqa/problems.json").read_text())
    folder.mkdir(exist_ok=True)
    with files.atomic_path(folder / "vit.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, np.random.default_rng(0).standard_normal((FEATURE_ROWS, *VIT), dtype=np.float32))
    pictured = [qid for qid, problem in problems.items() if problem["image"]]
    files.write_json(folder / "name_map.json", {qid: i % FEATURE_ROWS for i, qid in enumerate(pictured)})


def config_of(size: str, vocabulary: int, patch_size: tuple[int, int]) -> Any:
    """A policy's config: gated GELU and untied, as flan-alpaca."""
    from model import MultimodalT5Config

    return MultimodalT5Config(
        vocab_size=vocabulary, feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, patch_size=patch_size, **SIZES[size],
    )  # fmt: skip


def build_model(size: str, vocabulary: int, seed: int, patch_size: tuple[int, int]) -> Any:
    """A policy of one size, its loss near ln(vocabulary).

    The library draws lm_head from N(0, 1): logits of magnitude sqrt(d_model), a loss of 70, and a softmax so peaked
    that its gradients are denormals, which slow a CPU eightfold. With 1 / sqrt(d_model) none of that happens.
    """
    from model import T5ForMultimodalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForMultimodalGeneration(config_of(size, vocabulary, patch_size))
        with torch.no_grad():
            model.lm_head.weight.mul_(model.config.d_model**-0.5)
    return model


# -- timing ----------------------------------------------------------------------------------------------


def compare(
    released: Callable[[], Any],
    ours: Callable[[], Any],
    args: argparse.Namespace,
    work: tuple[float, float] = (1, 1),
    time_of: Callable[[Callable[[], Any], Any], float] = seconds,
) -> dict[str, Any]:
    """Both sides interleaved (A B, B A, ...) `--repeats` times; let ours run once before, untimed.

    `work`: units (samples, questions) that a call of either does; times are per unit. `time_of(function, device)`
    calls a side and returns its seconds. Returns medians and ranges in seconds, and the ratio released / ours of
    neighbouring calls: its median and range.
    """
    times: dict[str, list[float]] = {"released": [], "ours": []}
    for repeat in range(args.repeats):
        pair = [("released", released, work[0]), ("ours", ours, work[1])]
        for name, function, units in pair if repeat % 2 == 0 else reversed(pair):
            times[name].append(time_of(function, args.device) / units)
    ratios = [slow / fast for slow, fast in zip(times["released"], times["ours"], strict=True)]
    return {name: spread(values) for name, values in (*times.items(), ("ratio", ratios))}


def against_library(
    library: Callable[[], Any], ours: Callable[[], Any], args: argparse.Namespace, work: tuple[float, float] = (1, 1)
) -> dict[str, float]:
    """Ratio of today's transformers to ours on the same work, interleaved as in `compare`, at most twice each."""
    library()
    return compare(library, ours, argparse.Namespace(**vars(args) | {"repeats": min(2, args.repeats)}), work)["ratio"]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def linear(function: Callable[[int], Any], device: str, unit: int = 1) -> dict[str, float]:
    """Time of 2x and 4x the work over 1x, per unit of work: 1.0 is linear. `function(n)` does n x `unit`."""
    function(unit)
    once, twice, four = (seconds(lambda n=n: function(n * unit), device) for n in (1, 2, 4))
    return {"2x": twice / once / 2, "4x": four / once / 4}


def check(what: str, left: Any, right: Any, tolerance: float = 0.0) -> str:
    """One line that says both sides computed the same. Raises UserError where they differ by more than `tolerance`: of
    two lists the share of entries that may differ."""
    if isinstance(left, list):
        other = sum(one != two for one, two in zip(left, right, strict=False))
        same = len(left) == len(right) and other <= tolerance * len(left)
        apart = f" ({other} of {len(left)} differ)" if other else ""
    else:
        left, right = torch.as_tensor(left).double(), torch.as_tensor(right).double()
        largest = float((left - right).abs().max()) if left.shape == right.shape and left.numel() else 0.0
        same = left.shape == right.shape and largest <= tolerance
        apart = f" within {tolerance:g} (largest difference {largest:.2g})"
    if not same:
        raise UserError(f"{what}: the two sides differ: not equal{apart}; their times cannot be compared")
    return f"{what}: equal{apart}"


def profile(function: Callable[[], Any], args: argparse.Namespace) -> None:
    """With --profile: run `function` once under torch's profiler and print its table."""
    if not args.profile:
        return
    with torch.profiler.profile() as found:  # the CPU, and a GPU if there is one
        function()
    order = f"self_{args.device}_time_total"
    print0(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=48))


# -- report ----------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, stage: str, result: dict[str, Any], **more: Any) -> None:
    """Print a stage's result and, with --json, write it for run_all.sh.

    `result` is what `compare` returned (or holds a `ratio` of its own); `more`: `equal` (lines of `check`), `limit`
    (how close to the machine's limit), `peer` (of `against_library`), `scaling` (of `linear`), `slice` (what was
    measured), `projection` (name -> seconds per unit of work), and other values to print.
    """
    label, *targets = STAGES[stage]
    for line in more.get("equal", ()):
        print0(f"  {line}")
    for name in ("released", "ours"):
        if name in result:
            print0(f"  {name}: {_range(result[name], ' s')}")
    print0(f"{label}: {_range(result['ratio'], 'x')} (target >= {targets[args.device == 'cuda']}x)")
    if "peer" in more:
        print0(f"  against {PEERS[stage][0]}: {_range(more['peer'], 'x')} (target >= {PEERS[stage][1]}x)")
    if "scores" in more:
        print0(f"  scores alone: {_range(more['scores'], 'x')} (target >= {SCORES}x)")
    for name, value in more.items():
        if name not in ("equal", "peer", "scores"):
            print0(f"  {name}: {value}")
    if args.json:
        record = {"stage": label, "size": args.size, "device": args.device, **result, **more}
        record |= {"machine": machine(args), "questions": "sample" if SAMPLE.is_dir() else "demo"}
        files.write_json(args.json, record, indent=1)


def _range(values: dict[str, float], unit: str) -> str:
    return f"{values['median']:.3g}{unit} ({values['min']:.3g}-{values['max']:.3g})"
