"""The PPO step itself: its gradient against a float64 re-derivation, and every optional flag of it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import run_mm_cot_rl
from ares import cli, files
from ares.cli import UserError
from rl import flags as rl_flags
from rl import metrics, minibatches, optimizer, ppo, rollouts, run_folder
from tests.rl.rl_tools import make_trainer, random_rollouts


def gradients(trainer, step) -> dict[str, torch.Tensor]:
    """The gradient that one update hands to the optimizer; the update is not made."""
    kept = {}

    def keep():
        kept.update({name: p.grad.clone() for name, p in trainer.raw.named_parameters() if p.grad is not None})

    trainer.optimizer.step = keep
    trainer._update(step, 10)
    return kept


def lengths(trainer) -> list[tuple[int, int]]:
    """Of every rationale and its prompt."""
    roll = trainer.data.rollouts
    return list(zip(roll.lengths.tolist(), (trainer.prompts.lengths[q] for q in roll.qids), strict=True))


def plain_loss(trainer, rows) -> torch.Tensor:
    """The loss of an update over `rows`, row by row without any padding, from the definitions of SPEC 6 alone."""
    args, roll, data = trainer.args, trainer.data.rollouts, trainer.data
    spans = [slice(int(roll.offsets[row]), int(roll.offsets[row] + roll.lengths[row])) for row in rows]
    advantages = [data.advantages[span] for span in spans]
    if args.adv_normalization:
        every = torch.cat(advantages)
        mean = every.sum() / len(every)
        std = (((every - mean) ** 2).sum() / len(every) + 1e-8).sqrt()
        advantages = [(one - mean) / std for one in advantages]
    total, positions = 0.0, 0
    for row, span, advantage in zip(rows, spans, advantages, strict=True):
        actions = torch.tensor([roll.ids(row)])
        prompt = trainer.prompts.batch([roll.qids[row]])
        p = trainer.raw.policy(**prompt, decoder_input_ids=actions[:, :-1]).logits[0].softmax(-1)
        for t in range(actions.shape[1] - 1):
            ratio = p[t, actions[0, t + 1]] / roll.logprobs[span][t].exp()
            clipped = min(max(ratio, 1 - args.clip_range), 1 + args.clip_range)
            total = total - min(ratio * advantage[t], clipped * advantage[t])
            total = total + args.entropy_coef * (p[t] * p[t].log()).sum()
            positions += 1
        if args.algo == "ppo":
            values = trainer.raw.value_function(**prompt, decoder_input_ids=actions[:, :-1])[0]
            for t, value in enumerate(values):
                error, old = (value - data.returns[span][t]) ** 2, roll.values[span][t]
                if args.vf_clip_range is not None:
                    near = old + min(max(value - old, -args.vf_clip_range), args.vf_clip_range)
                    error = max(error, (near - data.returns[span][t]) ** 2)
                total = total + args.vf_coef * error
    return total / positions


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adv_normalization": False, "vf_coef": 0.3, "ga_step": 1},
        {"entropy_coef": 0.1, "vf_clip_range": 0.2, "rl_batch_size": 3, "clip_range": 0.1},
        {"algo": "rloo", "entropy_coef": 0.01, "ga_step": 3},
        {"rl_batch_size": 1, "ga_step": 8, "gradient_checkpointing": True},
        {"rl_batch_size": 1, "ga_step": 8, "pass_tokens": 60},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_gradient_of_the_whole_loss_agrees_with_a_float64_rederivation(tmp_path, changes):
    for seed in (0, 1):
        trainer = make_trainer(tmp_path, rows=7 + seed, seed=seed, **changes)
        args = trainer.args
        plan = minibatches.plan_epoch(lengths(trainer), args.rl_batch_size, 1, args.ga_step, seed)
        for place in {0, len(plan) - 1}:  # a full update and the short last one
            step = plan[place]
            got = gradients(trainer, step)
            names, parameters = zip(*((n, p) for n, p in trainer.raw.named_parameters() if n in got), strict=True)
            rows = [row for group in step for minibatch in group for row in minibatch]
            want = torch.autograd.grad(plain_loss(trainer, rows), parameters, allow_unused=True)
            largest = max(float(g.abs().max()) for g in want if g is not None)
            assert largest > 1e-3
            for name, expected in zip(names, want, strict=True):
                expected = torch.zeros_like(got[name]) if expected is None else expected
                torch.testing.assert_close(got[name], expected, atol=1e-7 * largest, rtol=1e-6, msg=name)


def first_update(trainer) -> dict:
    """The logged line of the first update."""
    seen = []
    trainer.metrics.log = lambda kind, number, update, values, **place: seen.append(values)
    plan = minibatches.plan_epoch(lengths(trainer), 2, 1, trainer.args.ga_step, 0)
    trainer._update(plan[0], 10)
    return seen[0]


def test_max_grad_norm_scales_the_gradient_and_logs_it_unscaled(tmp_path):
    step = [[[0, 1]], [[2, 3]]]
    free, held = (make_trainer(tmp_path, max_grad_norm=limit) for limit in (None, 0.05))
    norms = []
    for trainer in (free, held):
        got = gradients(trainer, step)
        norms.append(torch.nn.utils.get_total_norm(got.values()).item())
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.05, rel=1e-3)
    assert first_update(make_trainer(tmp_path, max_grad_norm=0.05))["grad_norm"] > 0.1


def test_accumulation_steps_of_accelerates_environment_change_no_gradient(tmp_path, monkeypatch):
    norms = []
    for steps in ("1", "8"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)  # left over from another project
        trainer = make_trainer(tmp_path)
        monkeypatch.setitem(trainer.accelerator.gradient_state.plugin_kwargs, "num_steps", int(steps))
        norms.append(first_update(trainer)["grad_norm"])
    assert norms[0] == norms[1]


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.raw.state_dict().items()}
    trainer.data.advantages[0] = math.nan
    trainer.args.adv_normalization = False
    with pytest.raises(UserError, match="not finite.*--max_grad_norm"):
        trainer._update([[[0, 1]]], 10)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.raw.state_dict().items())


def test_schedules_end_where_they_should():
    at = [[optimizer.scheduled_lr(kind, 2.0, done, 8) for done in (0, 4, 7, 8)] for kind in rl_flags.SCHEDULES]
    constant, linear, cosine = at
    assert constant == [2.0] * 4 and linear == [2.0, 1.0, 0.25, 0.0]
    assert cosine == pytest.approx([2.0, 1.0, 1 + math.cos(math.pi * 7 / 8), 0.0])


def test_the_learning_rate_used_is_the_scheduled_one(tmp_path):
    trainer = make_trainer(tmp_path, lr_scheduler="linear")
    used = []
    trainer.metrics.log = lambda kind, number, update, values, **place: used.append((kind, values["lr"]))
    trainer.train()
    rates = [lr for kind, lr in used if kind == "update"]
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rates[-1]}
    assert rates == pytest.approx([1e-2 * (1 - i / 6) for i in range(6)])  # 9 rows: 3 updates x 2 epochs


def test_an_epochs_line_holds_means_over_its_updates(tmp_path):
    trainer, lines = make_trainer(tmp_path), []
    trainer.metrics.log = lambda kind, number, update, values, **more: lines.append((kind, more["epoch"], values))
    trainer.train()
    for epoch in range(2):
        updates = [values for kind, at, values in lines if kind == "update" and at == epoch]
        (mean,) = [values for kind, at, values in lines if kind == "epoch" and at == epoch]
        assert len(updates) == 3 and mean["grad_norm"] == pytest.approx(sum(one["grad_norm"] for one in updates) / 3)
        weights = [one["positions"] / mean["positions"] for one in updates]
        for name in ("policy_loss", "approx_kl", "kl_ref", "entropy", "clipfrac"):
            assert mean[name] == pytest.approx(sum(w * one[name] for w, one in zip(weights, updates, strict=True)))
    assert lines[0][2]["grad_norm"] != pytest.approx(lines[1][2]["grad_norm"], rel=1e-3)  # no gradient is left over


def test_no_gradient_is_left_over_from_the_update_before(tmp_path):
    trainer, norms = make_trainer(tmp_path, lr=0.0), []
    trainer.metrics.log = lambda kind, number, update, values, **more: norms.append(values["grad_norm"])
    for _ in range(2):
        trainer._update([[[0, 1]], [[2, 3]]], 10)
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0


def test_the_newest_of_two_saved_states_is_resumed(tmp_path):
    trainer = make_trainer(tmp_path)
    for done in (1, 2, 3):
        trainer.position.done = trainer.position.update = done
        with torch.no_grad():
            trainer.raw.policy.lm_head.weight.fill_(done)
        trainer.save_state()
        again = make_trainer(tmp_path)
        assert again.restore() and again.position.done == done
        assert again.raw.policy.lm_head.weight.unique().tolist() == [done]
        assert again.slots[again.saves % 2] == trainer.slots[trainer.saves % 2], "the older slot is written next"


def test_weight_decay_is_for_matrices_only(tmp_path):
    trainer = make_trainer(tmp_path)
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.raw.named_parameters():
        if parameter.requires_grad:
            assert decay[id(parameter)] == (0.01 if parameter.ndim > 1 and "bias" not in name else 0.0), name
    assert len(trainer.names) == len(decay) and "value_function.lm_head.weight" not in trainer.names


def test_every_epoch_and_round_has_another_order(tmp_path):
    orders = {}
    for number in (0, 1):
        trainer = make_trainer(tmp_path, rows=9, rl_epochs=3)
        trainer.number = number
        update = trainer._update

        def seen(step, *more, number=number, trainer=trainer, update=update):
            orders.setdefault((number, trainer.position.epoch), []).append(step)
            return update(step, *more)

        trainer._update = seen
        trainer.train()
    flat = [[sorted(row for group in step for rows in group for row in rows) for step in one]
            for one in orders.values()]  # fmt: skip
    assert len(flat) == 6 and all(sorted(sum(one, [])) == list(range(9)) for one in flat)
    assert all(flat[i] != flat[j] for i in range(6) for j in range(i))


def test_an_epoch_ends_early_when_the_policy_runs_away(tmp_path):
    lines = {}
    for limit in (None, 1e-6):
        trainer = make_trainer(tmp_path, early_stop_kl=limit)
        seen = lines.setdefault(limit, [])
        trainer.metrics.log = lambda kind, number, update, values, seen=seen, epoch=0: seen.append((kind, epoch))
        trainer.train()
    assert lines[None] == [("update", 0)] * 3 + [("epoch", 0)] + [("update", 1)] * 3 + [("epoch", 1)]
    assert lines[1e-6] == [("update", 0), ("epoch", 0), ("update", 1), ("epoch", 1)]


def test_an_entropy_bonus_makes_a_peaked_policy_vary(tmp_path):
    gains = []
    for coef in (0.0, 1.0):
        trainer = make_trainer(tmp_path, entropy_coef=coef, adv_normalization=False, dtype=torch.float32)
        trainer.data.advantages.zero_()
        trainer.raw.policy.lm_head.weight.data.mul_(15)
        seen = []
        trainer.metrics.log = lambda kind, number, update, values, seen=seen, **place: seen.append(values["entropy"])
        trainer.train()
        gains.append(seen[-1] - seen[3])  # the mean of the last epoch less that of the first
    assert abs(gains[0]) < 0.01 < 0.05 < gains[1], gains


def test_checkpointed_gradients_are_those_of_eval_mode_and_blocks_run_twice(tmp_path):
    step = [[[0, 1]], [[2, 3]]]
    counts, found = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing)
        calls = []
        trainer.raw.policy.decoder.block[0].layer[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(gradients(trainer, step))
        counts.append(len(calls))
    assert counts == [2, 4]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-12, rtol=1e-9, msg=name)


def test_rloo_advantages_are_those_of_a_plain_loop(monkeypatch):
    rows = random_rollouts(9)
    scores = [[0.1 * (i + j) % 1 for j in range(int(n))] for i, n in enumerate(rows.sentence_counts)]
    args = SimpleNamespace(neutral_score=0.5, init_kl_coef=0.3, gamma=0.9, algo="rloo", rloo_baseline="token")
    monkeypatch.setattr(ppo, "CHUNK_ROWS", 3)
    data = ppo.compute_advantages(rows, scores, args, 0.3)  # never parts a question's two rows
    to_go = []
    for row in range(9):
        begin, n = int(rows.offsets[row]), int(rows.lengths[row])
        reward = (-0.3 * (rows.logprobs - rows.ref_logprobs))[begin : begin + n].tolist()
        for column, score in zip(rows.row_columns(row), scores[row], strict=True):
            reward[column - 1] += score - 0.5
        to_go.append([sum(0.9 ** (s - t) * reward[s] for s in range(t, n)) for t in range(n)])
    for row in range(9):
        other = row + 1 if row % 2 == 0 else row - 1  # rows 2i and 2i + 1 share question i; row 8 is alone
        for t, mine in enumerate(to_go[row]):
            baseline = (to_go[other] + [0.0] * 20)[t] if other < 9 else mine
            assert float(data.advantages[int(rows.offsets[row]) + t]) == pytest.approx(mine - baseline, abs=1e-5)


def test_target_kl_doubles_and_halves_the_recorded_coefficient(tmp_path):
    files.write_text(tmp_path / "args.yaml", "kl_coef: 0.4\n")
    args = SimpleNamespace(init_kl_coef=0.1, target_kl=2.0)
    near = [run_folder.kl_coefficient(args, tmp_path, False, kl) for kl in (0.5, 1.9, 2.9, 3.1)]
    assert near == [0.2, 0.4, 0.4, 0.8]
    assert run_folder.kl_coefficient(args, tmp_path, True, 9.0) == 0.1
    assert run_folder.kl_coefficient(SimpleNamespace(init_kl_coef=0.1, target_kl=None), tmp_path, False, 9.0) == 0.1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--algo rloo --do_sample True --vf_coef 1 --gae_lambda 1", ["--vf_coef", "--gae_lambda"]),
        ("--algo rloo --do_sample False", ["--do_sample True"]),
        ("--algo rloo --do_sample True --k_actions 1", ["--k_actions 2"]),
        ("--target_kl 1 --init_kl_coef 0", ["--target_kl", "--init_kl_coef"]),
        ("--max_grad_norm 0 --early_stop_kl -1 --vf_clip_range nan", ["max_grad_norm", "early_stop_kl", "vf_clip"]),
        ("--entropy_coef -1", ["--entropy_coef"]),
    ],
)  # fmt: skip
def test_flags_without_effect_or_out_of_range_are_refused(flags, words):
    with pytest.raises(UserError) as refusal:
        run_mm_cot_rl.parse_args(["--base_model_dir", ".", *flags.split()])
    for word in words:
        assert word in str(refusal.value)


def test_fp16_of_accelerates_configuration_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16.*overflows"):
        run_mm_cot_rl.parse_args(["--base_model_dir", "."])


@pytest.mark.parametrize(
    ("configured", "flag", "expected"),
    [("no", "auto", "no"), ("bf16", "auto", "bf16"), ("bf16", "fp32", "no"), ("no", "bf16", "bf16")],
)
def test_precision_follows_flag_then_configuration_then_gpu(monkeypatch, configured, flag, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert cli.mixed_precision(flag) == expected


@pytest.mark.parametrize(("major", "expected"), [(9, "bf16"), (7, "no")])
def test_bf16_is_chosen_where_the_gpu_computes_in_it(monkeypatch, major, expected):
    """torch says of any GPU that bf16 is supported: older ones emulate it, slower than fp32."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or major >= 8
    )
    assert cli.mixed_precision("auto") == expected


def test_warnings_say_what_is_wrong_and_what_to_do():
    fine = {"approx_kl": 0.01, "kl_ref": 0.1, "entropy": 1.0, "explained_variance": 0.3}
    assert metrics.epoch_warnings(fine, 1.2) == []
    for change, word in [
        ({"approx_kl": 0.5}, "--lr"), ({"kl_ref": 3.0}, "--init_kl_coef"), ({"entropy": 0.1}, "entropy collapse"),
        ({"explained_variance": -0.2}, "explained variance"),
    ]:  # fmt: skip
        (warning,) = metrics.epoch_warnings(fine | change, 1.2)
        assert word in warning
    fine = {"share_dropped": 0.05, "share_ended": 0.9}
    assert metrics.rollout_warnings(fine) == []
    (dropped,) = metrics.rollout_warnings(fine | {"share_dropped": 0.06})
    (cut,) = metrics.rollout_warnings(fine | {"share_ended": 0.2})
    assert "6%" in dropped and "80%" in cut and "--output_len" in cut


# -- value function --------------------------------------------------------------------------------------


def test_warm_up_trains_values_alone_and_advantages_follow_from_them(tmp_path):
    trainer = make_trainer(tmp_path, value_warmup=40, vf_lr=3e-3, gamma=0.9, gae_lambda=0.8)
    policy = {name: tensor.clone() for name, tensor in trainer.raw.policy.state_dict().items()}
    before, kinds = trainer.data, []
    trainer.metrics.log = lambda kind, number, update, values, **place: kinds.append((kind, update, place["epoch"]))
    trainer.warm_up()
    assert kinds == [("value_warmup", 0, epoch) for epoch in range(-40, 0)]
    assert all(torch.equal(policy[name], tensor) for name, tensor in trainer.raw.policy.state_dict().items())
    assert trainer.position == type(trainer.position)() and trainer.data.explained_variance() > 0.3
    roll, args = trainer.data.rollouts, trainer.args
    for row in range(len(roll)):  # one rationale at a time, in plain numbers
        begin, n = int(roll.offsets[row]), int(roll.lengths[row])
        actions = torch.tensor([roll.ids(row)])
        with torch.no_grad():
            prompt = trainer.prompts.batch([roll.qids[row]])
            values = trainer.raw.value_function(**prompt, decoder_input_ids=actions[:, :-1])[0].tolist()
        kl = roll.logprobs[begin : begin + n] - roll.ref_logprobs[begin : begin + n]
        rewards = (-args.init_kl_coef * kl).tolist()
        for column, score in zip(roll.row_columns(row), before.scores[row], strict=True):
            rewards[column - 1] += score - args.neutral_score
        advantage = to_go = 0.0
        for t in reversed(range(n)):
            following = values[t + 1] if t + 1 < n else 0.0
            advantage = rewards[t] + 0.9 * following - values[t] + 0.9 * 0.8 * advantage
            to_go = rewards[t] + 0.9 * to_go
            assert float(trainer.data.advantages[begin + t]) == pytest.approx(advantage, abs=1e-5)
            assert float(before.to_go[begin + t]) == pytest.approx(to_go, abs=1e-5)
    assert not torch.allclose(before.advantages.float(), trainer.data.advantages, atol=0.05)


def test_warm_up_that_is_stopped_goes_on_where_it_was(tmp_path):
    ends = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        folder.mkdir()
        trainer = make_trainer(folder, value_warmup=2)
        if stops:
            update = trainer._update

            def seen(*how, update=update, trainer=trainer):
                trainer.ctrl_c.pressed = trainer.position.epoch == -1 and trainer.position.update == 1
                return update(*how)

            trainer._update = seen
            with pytest.raises(KeyboardInterrupt, match="value warm-up is saved after update 2 of round 0"):
                trainer.warm_up()
            trainer = make_trainer(folder, value_warmup=2)
            assert trainer.restore() and (trainer.position.epoch, trainer.position.update) == (-1, 2)
        trainer.warm_up()
        again = make_trainer(folder, value_warmup=2)
        assert again.restore() and again.position.epoch == 0
        again.warm_up()  # takes the fitted values from their file
        torch.testing.assert_close(again.data.advantages, trainer.data.advantages, atol=1e-6, rtol=0)
        trainer.train()
        ends.append(trainer.raw.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("damage", ["absent", "cut", "other rollouts"])
def test_fitted_values_that_do_not_fit_are_refused(tmp_path, damage):
    path = tmp_path / "values.safetensors"
    rollouts.save_values(path, torch.zeros(9))
    if damage == "absent":
        path.unlink()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="values.safetensors"):
        rollouts.load_values(path, 8 if damage == "other rollouts" else 9)


def test_the_value_function_has_its_own_learning_rate_and_adam_its_eps(tmp_path):
    for vf_lr, want in ((None, 1e-2), (3e-2, 3e-2)):
        trainer = make_trainer(tmp_path, vf_lr=vf_lr, adam_eps=1e-3, lr_scheduler="linear", rl_epochs=1)
        rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-3}
        names = [name for name, p in trainer.raw.named_parameters() if p.requires_grad]
        assert {rates[id(trainer.raw.get_parameter(name))] for name in names if name[0] == "p"} == {1e-2}
        assert {rates[id(trainer.raw.get_parameter(name))] for name in names if name[0] == "v"} == {want}
        groups = [group for group in optimizer.parameter_groups(trainer.raw)]
        in_order = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
        assert in_order == [id(p) for group in groups for _, p in group], "saved states keep their order"
        trainer.train()
        last = {group["base_lr"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert last == pytest.approx({1e-2: 1e-2 / 3, want: want / 3})


def test_signal_share_is_that_of_pairs_of_gradients(tmp_path):
    trainer, found, lines = make_trainer(tmp_path, rl_epochs=1, rows=14), [], []
    clip = trainer._clip

    def keep():
        found.append(torch.cat([p.grad.flatten().clone() for p in trainer.raw.policy.parameters()]))
        return clip()

    trainer._clip = keep
    trainer.metrics.log = lambda kind, number, update, values, **place: lines.append((kind, values))
    trainer.train()
    a, b, c, _ = found  # 14 rows: 3 updates of 4 and one of 2
    dot, square = float(a @ b + c @ found[3]), sum(float(g @ g) for g in found) / 2
    assert lines[-1][1]["signal_share"] == pytest.approx(dot / square, rel=1e-9)


# -- groups ----------------------------------------------------------------------------------------------


def test_rows_of_a_question_share_a_minibatch(tmp_path):
    lengths, questions = [(row % 7 + 1, 5) for row in range(22)], [row // 2 for row in range(22)]
    plans = [minibatches.plan_epoch(lengths, 4, 2, 1, seed, questions) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    flat = [rows for step in plans[0] for group in step for rows in group]
    assert sorted(row for rows in flat for row in rows) == list(range(22))
    assert [len(step) for step in plans[0]] == [1, 1, 1] and len(flat) == 6
    assert all(rows[i] + 1 == rows[i + 1] for rows in flat for i in range(0, len(rows), 2))
    for algo, want in (("ppo", False), ("rloo", True)):
        more = ["--do_sample", "True"] if algo == "rloo" else []
        args = run_mm_cot_rl.parse_args(["--base_model_dir", ".", "--algo", algo, *more])
        assert args.group_by_question is want


def test_sentence_baseline_is_that_of_a_plain_loop():
    rng = torch.Generator().manual_seed(3)
    lengths, columns = [6, 4, 5, 3, 2], [[2, 4], [3], [1, 2, 5], [3], []]
    group = torch.tensor([0, 0, 0, 1, 2])
    to_go = torch.randn(5, 6, generator=rng, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    numbers = ppo.sentence_numbers(columns, 6)
    got = ppo.rloo_advantages(to_go, group, mask, numbers)

    def sentence(row: int, t: int) -> int:  # position t chooses the token in column t + 1
        return sum(t + 1 > column for column in columns[row])

    for row in range(5):
        others = [other for other in range(5) if other != row and group[other] == group[row]]
        for t in range(6):
            want = 0.0
            if t < lengths[row] and others:
                parts = []
                for other in others:
                    begins = [s for s in range(lengths[other]) if sentence(other, s) == sentence(row, t)]
                    parts.append(float(to_go[other, begins[0]]) if begins else 0.0)
                want = float(to_go[row, t]) - sum(parts) / len(parts)
            assert float(got[row, t]) == pytest.approx(want), (row, t)
