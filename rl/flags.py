"""The flags of run_mm_cot_rl.py beyond the common ones, and what is refused or said of them before anything loads.

Needs no torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from pathlib import Path

from ares import cli
from ares.cli import print0, str2bool

TRAIN_SPLITS = ("train", "trainval", "minitrain", "miniminitrain", "hardtrain")
# flags of main.py that have no meaning here: RL evaluates nothing
EVALUATION_ONLY = tuple("val_split test_split eval_le test_le eval_bs eval_acc use_generate final_eval".split())
VALUE_ONLY = ("vf_coef", "gae_lambda", "vf_clip_range")  # of no use without a value function
SCHEDULES = ("constant", "linear", "cosine")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add RL's flag groups to a parser that has the common ones."""
    models = parser.add_argument_group("models and rounds")
    models.add_argument("--base_model_dir", required=True, metavar="DIR", help="rationale model to start from")
    models.add_argument("--ref_model", metavar="DIR", help="frozen reference of the KL penalty (default: the start)")
    models.add_argument("--model_type", default="base", help="only names the run folder (base, large)")
    models.add_argument("--epochs", type=int, default=3, help="outer rounds, each with fresh samples")
    models.add_argument(
        "--continue_train", type=str2bool, default=False, help="go on after round --base_model_dir {run}/{n}"
    )
    models.add_argument("--run_dir", metavar="DIR", help="run folder (default: RL_models/{a name made of the flags})")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--k_actions", type=int, default=3, help="rationales per question")
    sampling.add_argument("--do_sample", type=str2bool, default=False, help="draw at random; False: greedy, one each")
    sampling.add_argument("--top_k", type=int, default=20, help="draw from the k likeliest tokens (0: from all)")
    sampling.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this mass")
    sampling.add_argument("--feedback", default="GPT4V", help="only names the run folder")

    rl = parser.add_argument_group("PPO")
    rl.add_argument(
        "--algo",
        default="ppo",
        choices=("ppo", "rloo"),
        help="rloo: no value function, the other rationales of a question are the baseline",
    )
    rl.add_argument("--rl_batch_size", type=int, default=6, help="samples per minibatch and process")
    rl.add_argument("--rl_epochs", type=int, default=3, help="passes over a round's samples")
    rl.add_argument("--ga_step", type=int, default=4, help="minibatches per optimizer step and process")
    rl.add_argument("--init_kl_coef", type=float, default=0.05, help="weight of the KL penalty in the reward")
    rl.add_argument("--clip_range", type=float, default=0.2, help="PPO's clip range of the ratio")
    rl.add_argument("--vf_coef", type=float, default=1.0, help="weight of the value loss")
    rl.add_argument("--gamma", type=float, default=0.99, help="discount")
    rl.add_argument("--gae_lambda", type=float, default=0.95, help="lambda of the advantage estimate")
    rl.add_argument("--adv_normalization", type=str2bool, default=True, help="whiten advantages per optimizer step")
    rl.add_argument("--neutral_score", type=float, default=0.5, help="score that earns no reward")

    more = parser.add_argument_group("PPO, off by default")
    more.add_argument(
        "--max_grad_norm", type=float, help="scale gradients down to this norm (policy and value together)"
    )
    more.add_argument("--lr_scheduler", default="constant", choices=SCHEDULES, help="learning rate over a round")
    more.add_argument(
        "--target_kl", type=float, help="nats per rationale: adapts the KL coefficient from round to round"
    )
    more.add_argument("--early_stop_kl", type=float, help="nats per token: ends an epoch when approx_kl exceeds it")
    more.add_argument("--entropy_coef", type=float, default=0.0, help="weight of an entropy bonus in the loss")
    more.add_argument("--vf_clip_range", type=float, help="clip the value's change from its value at sampling")

    memory = parser.add_argument_group("memory")
    cli.add_precision_flag(memory)
    memory.add_argument(
        "--pass_tokens",
        type=int,
        help="tokens (prompts, rationales and padding) that one forward and backward pass may have: neighbouring "
        "minibatches of an update are joined up to it, which fills a GPU; the update stays what it is (default: a "
        "minibatch a pass)",
    )
    memory.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    memory.add_argument(
        "--offload",
        action="store_true",
        help="keep reference and value function on the CPU while sampling needs neither",
    )

    running = parser.add_argument_group("running")
    running.add_argument(
        "--phase",
        default="all",
        choices=("all", "collect", "train"),
        help="collect: end after export; train: PPO only",
    )
    running.add_argument("--poll_seconds", type=float, default=10.0, help="pause between looks for replies")
    running.add_argument("--settle_seconds", type=float, default=60.0, help="wait this long for late replies")
    running.add_argument("--max_dropped", type=float, default=0.2, help="stop if a larger share of replies is lost")
    running.add_argument("--save_minutes", type=float, default=10.0, help="save PPO's state at least this often")
    running.add_argument("--overwrite", action="store_true", help="start anew; what is there is moved aside")
    running.add_argument("--log_term", type=int, default=200, help="print diagnostics every so many updates")
    running.add_argument(
        "--report_to", default="tensorboard", choices=("tensorboard", "wandb", "none"), help="besides metrics.jsonl"
    )


def check_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse, in one message, flags out of range, contradictory, or without effect. Warn of odd ones."""
    faults = [f"--{name} has no effect in RL; drop it" for name in EVALUATION_ONLY if name in given]
    at_least_one = ("epochs", "k_actions", "bs", "rl_batch_size", "rl_epochs", "ga_step", "log_term", "input_len")
    at_least_one += ("pass_tokens",) if args.pass_tokens is not None else ()
    faults += [f"--{name} must be at least 1" for name in at_least_one if getattr(args, name) < 1]
    faults += [
        f"--{name} must lie between 0 and 1"
        for name in ("gamma", "gae_lambda", "neutral_score", "max_dropped")
        if not 0 <= getattr(args, name) <= 1
    ]
    not_negative = ("init_kl_coef", "vf_coef", "top_k", "settle_seconds", "save_minutes", "entropy_coef")
    faults += [
        f"--{name} must be a number of at least 0"
        for name in not_negative
        if not (math.isfinite(getattr(args, name)) and getattr(args, name) >= 0)
    ]
    positive = ("lr", "clip_range", "poll_seconds", "top_p")
    if_given = ("max_grad_norm", "target_kl", "early_stop_kl", "vf_clip_range")
    positive += tuple(name for name in if_given if getattr(args, name) is not None)
    faults += [f"--{name} must be above 0" for name in positive if not 0 < getattr(args, name) < math.inf]
    if args.top_p > 1:
        faults.append("--top_p must be at most 1")
    if not -(2**63) <= args.seed < 2**63:
        faults.append("--seed must fit into 64 bits")
    if args.output_len < 2:
        faults.append("--output_len must be at least 2")
    if args.train_le and args.prompt_format.startswith("QCM-"):
        faults.append(f"--train_le has no effect with --prompt_format {args.prompt_format}; QCMG uses it")
    for name in ("base_model_dir", "ref_model"):
        path = getattr(args, name)
        if path and not Path(path).is_dir():
            faults.append(f"--{name}: no folder {path}; name the folder of a rationale model")
    if args.continue_train and not Path(args.base_model_dir).resolve().name.isdigit():
        faults.append(f"--continue_train True: --base_model_dir {args.base_model_dir} is no folder {{run}}/{{n}}")
    if args.algo == "rloo":
        faults += [f"--{name} has no effect with --algo rloo" for name in VALUE_ONLY if name in given]
        if args.k_actions < 2 or not args.do_sample:
            faults.append(
                "--algo rloo compares the rationales of a question: use --do_sample True, --k_actions 2 or more"
            )
    if args.target_kl is not None and args.init_kl_coef == 0:
        faults.append("--target_kl adapts the KL coefficient by factors of 2: give an --init_kl_coef above 0")
    if args.overwrite and args.phase == "train":
        faults.append("--overwrite would delete the rollouts that --phase train needs; drop one of them")
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        faults.append("--report_to wandb: the package is not installed; pip install wandb, or drop the flag")
    faults += cli.precision_faults() + check_sharding()
    cli.refuse(faults)
    if not args.do_sample and args.k_actions > 1:
        cli.warn0(f"--do_sample False gives {args.k_actions} equal rationales per question: sampling one (greedy)")
    if not args.do_sample and given & {"top_k", "top_p"}:
        cli.warn0("--top_k and --top_p only name the run folder with --do_sample False")
    if args.prompt_format.endswith("-A"):
        cli.warn0(f"--prompt_format {args.prompt_format} asks for an answer; rationale models are asked with QCM-E")
    if "user_msg" in given:
        print0("note: --user_msg names nothing in RL; --run_dir names the folder")


def check_sharding() -> list[str]:
    """What accelerate's configuration asks for and RL cannot do. What `accelerate launch` was told stands in the
    environment."""

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
