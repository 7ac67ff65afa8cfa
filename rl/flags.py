"""The flags of run_mm_cot_rl.py, one row each: type, default, help, range, and what a change of the flag invalidates.

To add a flag, add a row to FLAGS: parser, check and run folder (rl/run_folder.py) read it there. Needs no torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares import cli
from ares.cli import print0, str2bool

SCHEDULES = ("constant", "linear", "cosine")
TRAIN_SPLITS = ("train", "trainval", "minitrain", "miniminitrain", "hardtrain")

# What a change of a flag invalidates, in a run folder that has begun:
ROLLOUTS = ("rollouts",)  # samples, so their scores and updates too: refused once sampling has begun
UPDATES = ("updates",)  # refused once PPO has saved something; until then rollouts and replies stay valid
BOTH = ROLLOUTS + UPDATES
NOTHING = ()  # may change at any time
NO_EFFECT = None  # a flag of main.py that is refused here, because RL evaluates nothing


@dataclass(frozen=True)
class Range:
    """A check of a flag's value: `test`, and the words of the refusal ("--{name} must be ...")."""

    words: str
    test: Callable[[Any], bool]


AT_LEAST_1 = Range("at least 1", lambda x: x >= 1)
AT_LEAST_2 = Range("at least 2", lambda x: x >= 2)
FRACTION = Range("between 0 and 1", lambda x: 0 <= x <= 1)
NOT_NEGATIVE = Range("a number of at least 0", lambda x: 0 <= x < math.inf)
POSITIVE = Range("above 0", lambda x: 0 < x < math.inf)
SHARE = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
INT64 = Range("an integer of 64 bits", lambda x: -(2**63) <= x < 2**63)


@dataclass(frozen=True)
class Flag:
    """A row: `type` bool is a switch without a value; `group` None: ares.cli.add_common_flags declares the flag."""

    name: str
    invalidates: tuple[str, ...] | None
    range: Range | None = None
    group: str | None = None
    type: Any = None
    default: Any = None
    help: str = ""
    more: dict[str, Any] | None = None  # further arguments of add_argument


def _rows(group: str, *rows: tuple) -> list[Flag]:
    """Rows (name, invalidates, range, type, default, help[, more]) of one group of --help."""
    return [Flag(name, changes, limit, group, *rest) for name, changes, limit, *rest in rows]


# fmt: off
FLAGS = [
    # declared for every script by ares.cli.add_common_flags; moved data is fine: the prompts themselves are compared
    *(Flag(name, NOTHING) for name in ("data_root", "dataset", "images", "caption_file", "vision_features",
                                       "name_map", "model", "tokenizer", "user_msg", "decode_graph")),
    *(Flag(name, ROLLOUTS) for name in ("use_caption", "img_type", "train_split", "train_le", "options",
                                        "prompt_format")),
    *(Flag(name, NO_EFFECT) for name in ("val_split", "test_split", "eval_le", "test_le", "eval_bs", "eval_acc",
                                         "use_generate", "final_eval")),
    Flag("input_len", ROLLOUTS, AT_LEAST_1), Flag("output_len", ROLLOUTS, AT_LEAST_2),
    Flag("bs", ROLLOUTS, AT_LEAST_1), Flag("lr", UPDATES, POSITIVE), Flag("seed", BOTH, INT64),
    *_rows(
        "models and rounds",  # models are compared as resolved folders (rl/run_folder.py)
        ("base_model_dir", NOTHING, None, str, None, "rationale model to start from",
         {"required": True, "metavar": "DIR"}),
        ("ref_model", NOTHING, None, str, None, "frozen reference of the KL penalty (default: the start)",
         {"metavar": "DIR"}),
        ("epochs", NOTHING, AT_LEAST_1, int, 3, "outer rounds, each with fresh samples"),
        ("continue_train", NOTHING, None, str2bool, False, "continue after round --base_model_dir {run}/{n}"),
        ("run_dir", NOTHING, None, str, None, "run folder (default: RL_models/{a name made of the flags})",
         {"metavar": "DIR"}),
    ),
    *_rows(
        "sampling",
        ("k_actions", ROLLOUTS, AT_LEAST_1, int, 3, "rationales per question"),
        ("do_sample", ROLLOUTS, None, str2bool, False, "draw at random; False: greedy, one each"),
        ("top_k", ROLLOUTS, NOT_NEGATIVE, int, 20, "draw from the k most likely tokens (0: from all)"),
        ("top_p", ROLLOUTS, SHARE, float, 1.0, "draw from the most likely tokens of this mass"),
    ),
    *_rows(
        "PPO",
        ("algo", ROLLOUTS, None, str, "ppo",
         "rloo: no value function, the other rationales of a question are the baseline",
         {"choices": ("ppo", "rloo")}),
        ("rloo_baseline", UPDATES, None, str, "token",
         "their return-to-go at the same token, or where the sentence of the same number begins",
         {"choices": ("token", "sentence")}),
        ("group_by_question", UPDATES, None, str2bool, None,
         "keep the rationales of a question in one minibatch (default: True with --algo rloo)"),
        ("rl_batch_size", UPDATES, AT_LEAST_1, int, 6, "samples per minibatch and process"),
        ("rl_epochs", UPDATES, AT_LEAST_1, int, 3, "passes over a round's samples"),
        ("ga_step", UPDATES, AT_LEAST_1, int, 4, "minibatches per optimizer step and process"),
        ("init_kl_coef", UPDATES, NOT_NEGATIVE, float, 0.05, "weight of the KL penalty in the reward"),
        ("clip_range", UPDATES, POSITIVE, float, 0.2, "PPO's clip range of the ratio"),
        ("vf_coef", UPDATES, NOT_NEGATIVE, float, 1.0,
         "weight of the value loss; has an effect only through --max_grad_norm: policy and value function share no "
         "weight, and AdamW divides by the scale of the gradient"),
        ("gamma", UPDATES, FRACTION, float, 0.99, "discount"),
        ("gae_lambda", UPDATES, FRACTION, float, 0.95, "lambda of the advantage estimate"),
        ("adv_normalization", UPDATES, None, str2bool, True, "whiten advantages per optimizer step"),
        ("neutral_score", UPDATES, FRACTION, float, 0.5, "score that earns no reward"),
    ),
    *_rows(
        "value function",
        ("value_warmup", UPDATES, NOT_NEGATIVE, int, 0,
         "epochs that fit the value function alone, on a round's returns, before its values are used"),
        ("value_init", BOTH, None, str, "random",
         "last layer of a fresh value head: zero begins with V = 0, so advantages are discounted returns",
         {"choices": ("random", "zero")}),
        ("vf_lr", UPDATES, POSITIVE, float, None, "learning rate of the value function (default: --lr)"),
    ),
    *_rows(
        "PPO, off by default",
        ("max_grad_norm", UPDATES, POSITIVE, float, None,
         "scale gradients down to this norm (policy and value together)"),
        ("lr_scheduler", UPDATES, None, str, "constant", "learning rate over a round", {"choices": SCHEDULES}),
        ("target_kl", UPDATES, POSITIVE, float, None,
         "nats per rationale: adapts the KL coefficient from round to round"),
        ("early_stop_kl", UPDATES, POSITIVE, float, None, "nats per token: ends an epoch if approx_kl exceeds it"),
        ("adam_eps", UPDATES, POSITIVE, float, 1e-8,
         "eps of AdamW; a larger one keeps rows of tokens that are hardly ever sampled from moving as far as others"),
        ("entropy_coef", UPDATES, NOT_NEGATIVE, float, 0.0, "weight of an entropy bonus in the loss"),
        ("vf_clip_range", UPDATES, POSITIVE, float, None, "clip the value's change from its value at sampling"),
    ),
    *_rows(
        "memory",
        ("precision", UPDATES, None, str, "auto",
         "autocast; auto: bf16 on a GPU that has it (weights and optimizer stay fp32)",
         {"choices": ("auto", "fp32", "bf16")}),
        ("pass_tokens", NOTHING, AT_LEAST_1, int, None,
         "most tokens (prompts, rationales and padding) of one forward and backward pass: neighbouring minibatches of "
         "an update are joined up to it, which fills a GPU; the update is the same (default: on a GPU 8192, or what "
         "its memory suffices for; on a CPU a minibatch a pass)"),
        ("gradient_checkpointing", NOTHING, None, bool, False, "less memory, a third more time"),
        ("offload", NOTHING, None, bool, False,
         "keep reference and value function on the CPU while sampling needs neither"),
    ),
    *_rows(
        "running",
        ("phase", NOTHING, None, str, "all", "collect: end after export; train: PPO only",
         {"choices": ("all", "collect", "train")}),
        ("poll_seconds", NOTHING, POSITIVE, float, 10.0, "pause between two checks for replies"),
        ("settle_seconds", NOTHING, NOT_NEGATIVE, float, 60.0, "wait this long for late replies"),
        ("max_dropped", NOTHING, FRACTION, float, 0.2, "stop if a larger share of replies is lost"),
        ("save_minutes", NOTHING, NOT_NEGATIVE, float, 10.0, "save PPO's state at least this often"),
        ("overwrite", NOTHING, None, bool, False, "start anew; earlier rounds are moved to a subfolder"),
        ("log_term", NOTHING, AT_LEAST_1, int, 200, "print diagnostics every so many updates"),
        ("report_to", NOTHING, None, str, "tensorboard", "besides metrics.jsonl",
         {"choices": ("tensorboard", "wandb", "none")}),
    ),
    *_rows(
        "of the released code; only name the run folder",
        ("model_type", NOTHING, None, str, "base", "size of the model (base, large)"),
        ("feedback", NOTHING, None, str, "GPT4V", "the Teacher"),
    ),
]
# fmt: on


def invalidating(what: str) -> list[str]:
    """Names of the flags whose change invalidates `what` ("rollouts", "updates")."""
    return [flag.name for flag in FLAGS if flag.invalidates and what in flag.invalidates]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the common flags and RL's groups to a parser."""
    cli.add_common_flags(parser, output_len=512, lr=1e-5, train_splits=TRAIN_SPLITS)
    for title in dict.fromkeys(flag.group for flag in FLAGS if flag.group):
        group = parser.add_argument_group(title)
        for flag in FLAGS:
            if flag.group != title:
                continue
            options = {"type": flag.type, "default": flag.default, **(flag.more or {})}
            options = {"action": "store_true"} if flag.type is bool else options
            group.add_argument(f"--{flag.name}", help=flag.help, **options)


def check_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse, in one message, flags out of range, contradictory, or without effect. Warn of odd ones."""
    faults = [f"--{flag.name} has no effect in RL; drop it" for flag in FLAGS
              if flag.invalidates is NO_EFFECT and flag.name in given]  # fmt: skip
    for flag in FLAGS:
        value = getattr(args, flag.name)
        if flag.range is not None and value is not None and not flag.range.test(value):
            faults.append(f"--{flag.name} must be {flag.range.words}")
    if args.train_le and args.prompt_format.startswith("QCM-"):
        faults.append(f"--train_le has no effect with --prompt_format {args.prompt_format}; QCMG uses it")
    for name in ("base_model_dir", "ref_model"):
        path = getattr(args, name)
        if path and not Path(path).is_dir():
            faults.append(f"--{name}: no folder {path}; name the folder of a rationale model")
    if args.continue_train and not Path(args.base_model_dir).resolve().name.isdigit():
        faults.append(f"--continue_train True: --base_model_dir {args.base_model_dir} is no folder {{run}}/{{n}}")
    if args.algo == "rloo":
        of_value = ("vf_coef", "gae_lambda", "vf_clip_range", "value_warmup", "value_init", "vf_lr")
        faults += [f"--{name} has no effect with --algo rloo" for name in of_value if name in given]
        if args.k_actions < 2 or not args.do_sample:
            faults.append(
                "--algo rloo compares the rationales of a question: use --do_sample True, --k_actions 2 or more"
            )
    if args.algo == "ppo" and "rloo_baseline" in given:
        faults.append("--rloo_baseline has no effect with --algo ppo")
    if args.target_kl is not None and args.init_kl_coef == 0:
        faults.append("--target_kl adapts the KL coefficient by factors of 2: give an --init_kl_coef above 0")
    if args.overwrite and args.phase == "train":
        faults.append("--overwrite would delete the rollouts that --phase train needs; drop one of them")
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        faults.append("--report_to wandb: the package is not installed; pip install wandb, or drop the flag")
    faults += cli.precision_faults() + sharding_faults()
    cli.refuse(faults)
    if args.group_by_question is None:
        args.group_by_question = args.algo == "rloo"
    if not args.do_sample and args.k_actions > 1:
        cli.warn0(f"--do_sample False gives {args.k_actions} equal rationales per question: sampling one (greedy)")
    if not args.do_sample and given & {"top_k", "top_p"}:
        cli.warn0("--top_k and --top_p only name the run folder with --do_sample False")
    if args.prompt_format.endswith("-A"):
        cli.warn0(f"--prompt_format {args.prompt_format} asks for an answer; rationale models are asked with QCM-E")
    if "user_msg" in given:
        print0("note: --user_msg names nothing in RL; --run_dir names the folder")


def sharding_faults() -> list[str]:
    """What accelerate's configuration asks for and RL cannot do; `accelerate launch` sets the environment."""

    def asked(name: str) -> bool:
        return os.environ.get(name, "false").lower() == "true"

    if asked("ACCELERATE_USE_DEEPSPEED"):
        return [
            "the accelerate configuration asks for DeepSpeed, whose engine divides and steps on its own where "
            "RL divides by the positions of the whole update; configs/fsdp.yaml shards like ZeRO 2 or 3 without it"
        ]
    if not asked("ACCELERATE_USE_FSDP"):
        return []
    if asked("ACCELERATE_USE_CPU"):
        return [
            "the accelerate configuration asks for FSDP on CPU, where accelerate runs DDP instead without a word; "
            "use a configuration without FSDP (configs/)"
        ]
    faults = []
    if os.environ.get("FSDP_VERSION", "1") != "2":
        faults.append("the accelerate configuration asks for FSDP 1; say fsdp_version: 2, as in configs/fsdp.yaml")
    if asked("FSDP_OFFLOAD_PARAMS"):
        faults.append("fsdp_offload_params of the accelerate configuration is not supported; set it to false")
    if asked("FSDP_ACTIVATION_CHECKPOINTING"):
        faults.append("fsdp_activation_checkpointing has no effect in RL; use --gradient_checkpointing")
    return faults
