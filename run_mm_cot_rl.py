"""RL with sentence-level feedback: sample rationales, have the Teacher score them, train with PPO, save a round.

One round (there are `--epochs`, each with fresh samples):

 1. sample k rationales per training question; log-probabilities, reference log-probabilities and values go to disk
 2. export them sentence by sentence to {run}/questions and signal (`Rationale Finished`)
 3. wait for the Teacher's scores (`Waiting for the feedback`); no model is in memory meanwhile
 4. PPO on the scores, restartable; write {run}/{round}: policy, tokenizer, value function, optimizer

    accelerate launch run_mm_cot_rl.py --data_root data/ScienceQA/data --caption_file data/instruct_captions.json \\
        --use_caption --img_type vit --prompt_format QCM-E --base_model_dir models/mm-cot-base-rationale \\
        --ref_model models/mm-cot-base-rationale --k_actions 4 --bs 64 --output_len 512 --rl_batch_size 8 \\
        --init_kl_coef 0.0001 --top_k 50 --rl_epochs 10 --lr 2e-5 --clip_range 0.2 --epochs 1 --ga_step 8 \\
        --gamma 1.0 --adv_normalization True --do_sample True --continue_train False

After a kill the same command resumes where it stopped. `--phase collect` ends after step 2 and `--phase train` begins
at step 4, so that the GPUs are free while the Teacher works. Runs alone (`python run_mm_cot_rl.py ...`), on CPU, on
several machines that share a file system (configs/), and without images (no `--img_type`). Flags: rl/flags.py; the run
folder: rl/run_folder.py; steps 1 and 2: rl/collection.py; rollouts on disk: rl/rollouts.py; from scores to the loss:
rl/ppo.py; updates and resuming: rl/trainer.py. docs/rl.md defines every diagnostic.

DeepSpeed and FSDP 1 are refused; FSDP 2 shards PPO, sampling uses unsharded models (rl/sharding.py).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares import cli, files, launch
from ares.cli import UserError, print0, run
from rl import flags, run_folder
from sft.lora import peft_fault
from teacher import handoff

# -- flags -----------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags. Raises UserError that names every flag at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=cli.HelpFormatter)
    flags.add_flags(parser)
    args = parser.parse_args(argv)
    flags.check_flags(args, cli.given_flags(parser, argv))
    return args


# -- set-up ----------------------------------------------------------------------------------------------


@dataclass
class Setup:
    """What all rounds of a run share."""

    args: argparse.Namespace
    run: Path
    accelerator: Any
    tokenizer: Any
    problems: dict[str, Any]
    prompts: Any  # rollouts.Prompts
    patch_size: tuple[int, int] | None
    start: int  # number of the first round


def set_up(args: argparse.Namespace, held: contextlib.ExitStack) -> Setup:
    """Read and check data and checkpoints, start the process group, claim the run folder. Loads no model.

    `held` keeps the run folder's lock. A UserError on rank 0 ends every rank.
    """
    import utils_data
    from model import check_checkpoint
    from rl import optimizer

    data = utils_data.load_data(args, {"train": args.train_split})
    args.reference = run_folder.reference_folder(args)
    info = check_checkpoint(args.base_model_dir, data.patch_size, args.img_type, flag="--base_model_dir")
    reference = check_checkpoint(args.reference, data.patch_size, args.img_type, flag="--ref_model")
    if reference.config.vocab_size != info.config.vocab_size:
        raise UserError(
            f"--ref_model: {args.reference} has a vocabulary of {reference.config.vocab_size}, "
            f"--base_model_dir one of {info.config.vocab_size}; the two must share a tokenizer"
        )
    if args.continue_train:
        for name in ("value_function.pth", "optimizer_state.pth")[args.algo == "rloo" :]:
            if not (Path(args.base_model_dir) / name).exists():
                raise UserError(f"--continue_train True: {args.base_model_dir} has no {name}; start without it")
        # now, before a Teacher is paid
        optimizer.check_optimizer(Path(args.base_model_dir) / "optimizer_state.pth", info, args.algo == "ppo")
    tokenizer = utils_data.load_tokenizer(args, args.base_model_dir, args.reference)
    utils_data.check_vocabulary(tokenizer, info)
    le = utils_data.read_le(args.train_le, data.qids["train"], "--train_le") if args.train_le else None
    folder, start = run_folder.run_folder(args), run_folder.first_round(args)
    files.writable_dir(folder, "--run_dir")

    from datetime import timedelta

    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    from ares.devices import on_gpu
    from rl import memory, sharding
    from rl.rollouts import Prompts
    from sft.predict import from_rank0, tokenizer_digest

    # long waits go through files, never through a collective; two hours cover the saving of a large model
    kwargs = [
        InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    precision = cli.mixed_precision(args.precision)
    args.precision = "bf16" if precision == "bf16" else "fp32"  # args.yaml records what ran
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=kwargs)
    sharding.check_processes(accelerator)
    launch.note_unused_gpus(torch.cuda.device_count(), "run_mm_cot_rl.py")
    if args.pass_tokens is None and on_gpu(accelerator.device):
        free = torch.tensor([torch.cuda.mem_get_info()[0]], device=accelerator.device)
        args.pass_tokens = memory.default_pass_tokens(int(accelerator.gather(free).min()), info, args)
    held.enter_context(launch.only_launch(folder, from_rank0))
    if cli.rank() == 0:
        args.features = None if data.features is None else data.features.digest(data.qids["train"])
        args.tokenizer_pieces = tokenizer_digest(tokenizer)
    from_rank0(lambda: run_folder.claim(args, folder, start))
    dataset = utils_data.RationaleDataset(data.problems, data.qids["train"], tokenizer, args, le)
    collator = utils_data.Collator(tokenizer.pad_token_id, data.features, device=accelerator.device)
    prompts = Prompts(dataset, collator, accelerator.device)
    print0(
        f"run folder {folder}: {len(dataset)} questions, {accelerator.num_processes} process(es) "
        f"on {accelerator.device.type}, {args.precision}"
        + (f", up to {args.pass_tokens} tokens in a pass" if args.pass_tokens else "")
    )
    return Setup(args, folder, accelerator, tokenizer, data.problems, prompts, data.patch_size, start)


# -- one round -------------------------------------------------------------------------------------------


def load_model(setup: Setup, folder: str | Path, value: bool = False, device: Any = None):
    """A policy or value function in eval mode, on `device` (default: this process's)."""
    import model
    from ares import decoding

    decoding.use_graphs(setup.args.decode_graph)
    cls = model.T5ForMultimodalGenerationValueFunction if value else model.T5ForMultimodalGeneration
    loaded = cls.from_pretrained(folder, patch_size=setup.patch_size, seed=setup.args.seed)
    if value and setup.args.value_init == "zero" and not (Path(folder) / model.VALUE_FUNCTION).exists():
        for parameter in loaded.v_head[-1].parameters():
            parameter.data.zero_()
    model.choose_attention(loaded, setup.accelerator.device)
    return loaded.to(device or setup.accelerator.device).eval()


def load_frozen(setup: Setup, folder: str | Path, value: bool = False, device: Any = None):
    """`load_model` for sampling: no gradients, and half the memory if autocast rounds the weights anyway."""
    from rl import actor_critic

    model = load_model(setup, folder, value, device).requires_grad_(False)
    return actor_critic.cast_linears_bf16(model) if setup.accelerator.mixed_precision == "bf16" else model


def start_folder(setup: Setup, number: int) -> Path:
    """The model that round `number` starts from."""
    return Path(setup.args.base_model_dir) if number == setup.start else setup.run / str(number - 1)


def begin_collection(setup: Setup, store, number: int) -> None:
    """Refuse an export without rollouts; record the settings that the rollouts depend on. On rank 0 only."""
    if not store.plan_file.exists() and run_folder.holds_export(store.questions):
        raise UserError(f"{store.questions} is there without its rollouts; move it away or use --overwrite")
    files.write_json(
        store.folder / run_folder.SAMPLING_FILE, run_folder.sampling_identity(setup.args, setup.run, number)
    )


def collect_round(setup: Setup, store, number: int, k: int) -> None:
    """Steps 1 and 2: sample the batches that are not on disk, export them, signal."""
    from ares.devices import enough_memory
    from rl import collection, memory, rollouts
    from rl.sampling import Models, Sampling, sample_batch
    from sft.predict import from_rank0
    from teacher.data_check import write_record

    args = setup.args
    sampling = Sampling(k, args.do_sample, args.top_k, args.top_p, args.output_len)
    from_rank0(lambda: begin_collection(setup, store, number))
    batches = store.plan(setup.prompts, args.bs, k)
    if cli.rank() == 0:  # before the first rationale: a Teacher may read along
        write_record(store.questions, setup.problems, list(setup.prompts.lengths))
    print0(f"round {number}: {sum(map(len, batches))} questions x {k} rationales in {len(batches)} batches")

    def load():
        start, place = start_folder(setup, number), "cpu" if args.offload else None
        policy = load_frozen(setup, start)
        # in the first round of the paper's command the reference is the starting model
        same = Path(start).resolve() == Path(args.reference).resolve()
        return Models(
            policy=policy,
            reference=policy if same else load_frozen(setup, args.reference, device=place),
            value_function=None if args.algo == "rloo" else load_frozen(setup, start, value=True, device=place),
            offload=args.offload,
        )

    models: list[Models] = []  # loaded for the first batch that is not on disk
    lack = f"--bs: the GPU's memory does not suffice to sample {args.bs} x {k} rationales; lower it, or use --offload"

    def sample(index: int, qids: Sequence[str]):
        seed = rollouts.seed_for(args.seed, "sampling", number, index)
        with enough_memory(lack):
            models.extend([] if models else [load()])
            with setup.accelerator.autocast():
                sampled = sample_batch(models[0], setup.prompts.batch(qids), sampling, seed)
        return rollouts.to_rollouts(sampled, qids, k, cli.rank(), setup.tokenizer)

    if memory.wanted(setup.accelerator) and cli.rank() < len(batches):
        # the first batch, which has the longest prompts, says how long rationales are; nothing is exported yet
        first = store.shard(cli.rank())
        if not first.exists():
            sample(cli.rank(), batches[cli.rank()]).save(first)
        models.clear()
        check_memory(setup, number, rollouts.Rollouts.load(first).lengths.tolist())
    collection.collect(store, batches, sample, setup.tokenizer)


def check_memory(setup: Setup, number: int, lengths: Sequence[int]) -> None:
    """Raise UserError if PPO on rationales of these lengths would run out of the GPU's memory."""
    from rl import memory

    def load():
        start = start_folder(setup, number)
        return load_model(setup, start), None if setup.args.algo == "rloo" else load_model(setup, start, value=True)

    free_memory()
    try:
        memory.dry_run(load, setup.prompts, setup.args, setup.accelerator, lengths)
    finally:
        free_memory()


def await_feedback(setup: Setup, store) -> dict:
    """Step 3: rank 0 waits for the replies and decides which samples count; the others wait for its decision."""
    from rl import rollouts

    args = setup.args
    if cli.rank() == 0 and not store.scores_file.exists():
        rows = store.load()
        actions = sorted({rows.action[row] for row in rollouts.rows_with_sentences(rows)})
        if args.phase == "train":
            open_actions = [action for action in actions if not handoff.is_done(store.questions, action)]
            if open_actions:
                counts = [handoff.progress_counts(store.questions, action) for action in open_actions]
                answered, total = (sum(column) for column in zip(*counts, strict=True))
                raise UserError(
                    f"{store.questions}: no {handoff.DONE} for action {', '.join(map(str, open_actions))} "
                    f"({answered} of {total} answered there); score them (haiku.py), or wait with --phase all"
                )
        print0("Waiting for the feedback")
        handoff.wait_for_feedback(store.questions, actions, args.poll_seconds, args.settle_seconds)
        rollouts.read_feedback(store, rows, args.max_dropped)
    store.wait_for(store.scores_file, args.poll_seconds)
    return rollouts.read_decision(store.scores_file)


def train_round(setup: Setup, store, number: int, decision: dict) -> None:
    """Step 4: PPO from the rollouts on disk, then the round's folder."""
    from rl import ppo, rollouts, sharding
    from rl.metrics import Metrics, rollout_warnings, text_figures, write_samples
    from rl.optimizer import load_moments, read_optimizer
    from rl.saved_state import Position
    from rl.trainer import PpoTrainer

    args, start = setup.args, start_folder(setup, number)
    rows, scores = rollouts.scored(store.load(), decision)
    dropped = sum(map(len, decision["dropped"].values()))
    share_dropped = dropped / (len(rows) + dropped)
    kl = float(ppo.kl_per_rationale(rows).mean())
    args.kl_coef = run_folder.kl_coefficient(args, start, number == 0, kl)  # args.yaml records it
    data = ppo.compute_advantages(rows, scores, args, args.kl_coef)
    metrics = Metrics(setup.run, args.report_to, vars(args))
    trainer = PpoTrainer(
        load_model(setup, start),
        None if args.algo == "rloo" else load_model(setup, start, value=True),
        data,
        setup.prompts,
        args,
        setup.accelerator,
        state=setup.run / "state",
        metrics=metrics,
        number=number,
        fitted=store.fitted_file,
        share_dropped=share_dropped,
        sharded=sharding.sharding_of(setup.accelerator),
    )
    if trainer.restore():
        metrics.rewind(number, trainer.position.done, trainer.position.epoch)
    else:
        if number > 0 and (number > setup.start or args.continue_train):
            saved = read_optimizer(start / "optimizer_state.pth", trainer.names)
            load_moments(trainer.optimizer, saved["state"])
        if cli.rank() == 0:
            files.write_json(store.folder / run_folder.PPO_FILE, run_folder.ppo_identity(args))
        metrics.rewind(number, None)
        values = data.row_stats(range(len(rows)))
        values |= {"rationales": len(rows), "share_dropped": share_dropped, "kl_coef": args.kl_coef}
        values |= {"kl_per_rationale": kl}
        values |= {f"dropped_{reason}": len(keys) for reason, keys in decision["dropped"].items()}
        if args.algo == "ppo":
            values["explained_variance"] = data.explained_variance()
        if cli.rank() == 0:
            values |= text_figures(rows, setup.problems, setup.tokenizer)
        metrics.log("rollout", number, 0, values)
        print0(f"round {number}: {len(rows)} rationales, mean sentence score {values['mean_sentence_score']:.4f}")
        for warning in rollout_warnings(values):
            cli.warn0(f"round {number}: {warning}")
    trainer.warm_up()
    if cli.rank() == 0 and trainer.position == Position():
        table = setup.run / f"samples_round_{number}.jsonl"
        write_samples(table, trainer.data, scores, setup.prompts.texts, setup.tokenizer)
    trainer.train()
    save_round(setup, trainer, number)
    setup.accelerator.free_memory()  # accelerate keeps references to what it prepared
    metrics.close()


def save_round(setup: Setup, trainer, number: int) -> None:
    """Write {run}/{number} in one step, then rename its questions folder and delete the PPO state."""
    import torch

    from ares.checkpoints import portable_tokenizer
    from model import save_value_function
    from rl import sharding
    from rl.optimizer import optimizer_state

    writes, value_function = cli.rank() == 0, trainer.raw.value_function
    policy = sharding.full_state(trainer.raw.policy, writes)  # every process takes part, one writes
    value = None if value_function is None else sharding.full_state(value_function, writes)
    optimizer = optimizer_state(trainer.optimizer, trainer.names, writes)
    if writes:
        with files.atomic_dir(setup.run / str(number)) as folder:
            trainer.raw.policy.save_pretrained(folder, state_dict=policy)
            setup.tokenizer.save_pretrained(folder)
            portable_tokenizer(folder)
            if value_function is not None:
                save_value_function(value_function, folder, value)
            torch.save(optimizer, folder / "optimizer_state.pth")
            files.write_args(folder, setup.args)
        run_folder.tidy(setup.run, number + 1)
    setup.accelerator.wait_for_everyone()
    print0(f"round {number} saved to {setup.run / str(number)}")


def free_memory() -> None:
    """Free the memory of deleted models, so that a GPU is free while the Teacher works."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    launch.use_expandable_segments()
    typed = sys.argv[1:] if argv is None else argv
    args = parse_args(typed)
    launch.check_processes("run_mm_cot_rl.py")
    if fault := peft_fault():
        cli.warn0(fault)  # now, because the stages before it is needed take hours
    with contextlib.ExitStack() as held:
        setup = set_up(args, held)
        run_rounds(setup, typed)
        setup.accelerator.end_training()


def run_rounds(setup: Setup, typed: Sequence[str]) -> None:
    """All rounds of --epochs and --phase. `typed`: the command line, for the commands that are printed."""
    from rl import memory, rollouts

    args = setup.args
    k = args.k_actions if args.do_sample else 1  # greedy rationales of a question are all equal
    for number in range(setup.start, setup.start + args.epochs):
        if run_folder.finished(setup.run, number):
            print0(f"round {number} is finished: {setup.run / str(number)}")
            continue
        store = rollouts.RolloutStore(setup.run, number)
        if store.collected_file.exists():
            store.plan(setup.prompts, args.bs, k)  # the prompts are still those of the rollouts
            if memory.wanted(setup.accelerator):  # perhaps on another GPU than before
                check_memory(setup, number, store.load().lengths.tolist())
        else:
            if args.phase == "train":
                raise UserError(f"--phase train: {store.folder} holds no finished rollouts; run --phase collect first")
            with store.failure_shared():
                collect_round(setup, store, number, k)
            free_memory()
        print0("Rationale Finished")
        if args.phase == "collect":
            print0(f"round {number} is collected")
            launch.next_step(*run_folder.next_commands(args, setup.run, typed))
            return
        with store.failure_shared():
            decision = await_feedback(setup, store)
        train_round(setup, store, number, decision)
        free_memory()
        if args.phase == "train":
            break
    launch.next_step([
        "accelerate", "launch", "main.py", *launch.data_words(args), "--prompt_format", args.prompt_format,
        "--output_len", args.output_len, "--use_generate", "--final_eval", "--evaluate_dir", setup.run / str(number),
    ])  # fmt: skip


if __name__ == "__main__":
    run(main)
