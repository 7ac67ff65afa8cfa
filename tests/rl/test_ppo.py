"""rl/ppo.py against the released code's numbers, a plain float64 re-derivation, and its own conventions."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ares import head as head_module
from ares.decoding import action_mask
from rl import ppo
from tests.rl.rl_tools import random_rollouts

CASES = range(20)


@pytest.fixture(scope="module")
def released(fixtures):
    """Cases of fixtures/ppo.npz: {"values": (B, T) tensor, ...} plus the entry of ppo.json."""
    meta = json.loads((fixtures / "ppo.json").read_text())["cases"]
    arrays = np.load(fixtures / "ppo.npz")
    cases = []
    for entry in meta:
        prefix = f"c{entry['case']:02d}_"
        tensors = {k.removeprefix(prefix): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(prefix)}
        cases.append({**entry, **tensors, "mask": tensors["mask"].bool()})
    return cases


def plain_gae(rewards, values, n, gamma, lam):
    """One row, in Python floats: the definition, sum over l of (gamma lam)^l delta_{t+l}, not the recursion."""
    value = [*values[:n], 0.0]
    delta = [rewards[t] + gamma * value[t + 1] - value[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]


def head(logits, labels):
    """`head_module.head_logprobs` of given logits (B, T, V) and labels (B, T): the head is the identity."""
    states, V = logits.flatten(0, 1), logits.size(-1)
    logprobs, entropy = head_module.head_logprobs(states, torch.eye(V, dtype=logits.dtype), labels.flatten())
    return logprobs.view(labels.shape), entropy.view(labels.shape)


def random_case(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    B, T = int(torch.randint(1, 6, (), generator=g)), int(torch.randint(1, 17, (), generator=g))
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    mask = torch.arange(T) < lengths[:, None]
    names = ("values", "rewards", "old", "new", "ref", "new_values")
    case = {name: torch.randn(B, T, generator=g, dtype=dtype) for name in names}
    return {**case, "mask": mask, "lengths": lengths}


# -- the released code's numbers -------------------------------------------------------------------------


def test_all_released_cases_are_here(released):
    assert len(released) == len(CASES)
    assert any(min(case["n_tokens"]) < case["T"] for case in released)


@pytest.mark.parametrize("i", CASES)
def test_gae(released, i):
    """Released bug: GAE runs over the padded width, where values and rewards of a short row need not be 0.

    Where they are (or the row is as wide as the batch) ours is the released one; else it is that of the row alone.
    """
    case = released[i]
    mask, gamma, lam = case["mask"], case["gamma"], case["lam"]
    advantages, returns = ppo.gae(case["rewards"], case["values"], mask, gamma, lam)
    padded, padded_returns = ppo.gae(case["rewards"], case["values"], torch.ones_like(mask), gamma, lam)
    torch.testing.assert_close(padded, case["adv"], atol=1e-5, rtol=1e-5)  # the bug, reproduced
    torch.testing.assert_close(padded_returns, case["returns"], atol=1e-5, rtol=1e-5)
    assert case["n_tokens"] == mask.sum(1).tolist()
    for row, n in enumerate(case["n_tokens"]):
        expected = plain_gae(case["rewards"][row].tolist(), case["values"][row].tolist(), n, gamma, lam)
        torch.testing.assert_close(advantages[row, :n], torch.tensor(expected), atol=1e-5, rtol=1e-5)
        clean = not case["rewards"][row, n:].any() and not case["values"][row, n:].any()
        if clean:
            torch.testing.assert_close(advantages[row], case["adv"][row], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(returns[row], case["returns"][row], atol=1e-5, rtol=1e-5)
        else:
            assert (advantages[row, :n] - case["adv"][row, :n]).abs().max() > 1e-5
    assert not advantages[~mask].any() and not returns[~mask].any()


@pytest.mark.parametrize("i", CASES)
def test_whitening(released, i):
    """Released bug: the padding counts. `_dist` has the biased variance (ours), `_nodist` the unbiased one."""
    case = released[i]
    everything = torch.ones_like(case["mask"])
    n = everything.numel()
    white, mean = ppo.masked_whiten(case["adv"], everything), case["adv"].double().mean().float()
    torch.testing.assert_close(white, case["adv_white_dist"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(white + mean, case["white_noshift_dist"], atol=1e-4, rtol=1e-4)
    if n > 1:
        unbiased = white * ((n - 1) / n) ** 0.5
        torch.testing.assert_close(unbiased, case["adv_white_nodist"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(unbiased + mean, case["white_noshift_nodist"], atol=1e-4, rtol=1e-4)
    right = ppo.masked_whiten(case["adv"], case["mask"])
    real = right[case["mask"]].double()
    assert abs(real.mean()) < 1e-5
    if len(real) > 1 and real.std() > 0:
        assert abs(real.var(correction=0) - 1) < 1e-3
    assert not right[~case["mask"]].any()


@pytest.mark.parametrize("which", ["raw", "white_dist"])
@pytest.mark.parametrize("i", CASES)
def test_losses_and_gradients(released, i, which):
    """Policy and value loss, clip fraction and both gradients are right as released."""
    case = released[i]
    advantages = case["adv"] if which == "raw" else case["adv_white_dist"]
    mask, clip, expected = case["mask"], case["clip_range"], case[f"loss_{which}"]
    logprobs = case["new_logprobs"].clone().requires_grad_()
    values = case["new_values"].clone().requires_grad_()
    policy = ppo.policy_loss(logprobs, case["old_logprobs"], advantages, mask, clip)
    value = ppo.value_loss(values, case["returns"], mask)
    total = policy + case["vf_coef"] * value
    total.backward()
    got = [policy.item(), value.item(), total.item()]
    assert got == pytest.approx([expected["policy_loss"], expected["value_loss"], expected["total_loss"]], abs=1e-5)
    share = ppo.clipfrac(logprobs, case["old_logprobs"], advantages, mask, clip)
    assert share.item() == pytest.approx(expected["clipfrac"], abs=1e-5)
    torch.testing.assert_close(logprobs.grad, case[f"dlogprobs_{which}"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values.grad, case[f"dvalues_{which}"], atol=1e-5, rtol=1e-5)


def test_released_logprobs(fixtures):
    arrays = np.load(fixtures / "ppo.npz")
    logits, labels, out = (torch.from_numpy(arrays[f"lol_{name}"]) for name in ("logits", "labels", "out"))
    got, _ = head(logits[:, : labels.size(1)], labels)
    torch.testing.assert_close(got, out, atol=1e-5, rtol=1e-5)


# -- re-derivations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_gae_is_a_plain_loop_and_ignores_the_padding(seed):
    case = random_case(seed)
    gamma, lam = [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0)][seed % 3]
    advantages, returns = ppo.gae(case["rewards"], case["values"], case["mask"], gamma, lam)
    for row, n in enumerate(case["lengths"].tolist()):
        expected = plain_gae(case["rewards"][row].tolist(), case["values"][row].tolist(), n, gamma, lam)
        assert advantages[row, :n].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, :n].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, case["values"][row].tolist(), strict=False)], abs=1e-12
        )


def plain_losses(case, logprobs, values, advantages, returns, clip):
    """Losses written per token, the clip as a branch."""
    policy, value, n = 0.0, 0.0, 0
    for row, length in enumerate(case["lengths"].tolist()):
        for t in range(length):
            ratio = torch.exp(logprobs[row, t] - case["old"][row, t])
            clipped = ratio if 1 - clip <= ratio <= 1 + clip else ratio.detach().clamp(1 - clip, 1 + clip)
            a = advantages[row, t]
            policy = policy - (ratio * a if ratio * a <= clipped * a else clipped * a)
            value = value + (values[row, t] - returns[row, t]) ** 2
            n += 1
    return policy / n, value / n


@pytest.mark.parametrize("seed", range(8))
def test_gradients_agree_with_a_float64_rederivation(seed):
    case = random_case(100 + seed)
    advantages, returns = ppo.gae(case["rewards"], case["values"], case["mask"], 0.99, 0.95)
    whitened = ppo.masked_whiten(advantages, case["mask"])
    grads = []
    for ours in (True, False):
        logprobs, values = case["new"].clone().requires_grad_(), case["new_values"].clone().requires_grad_()
        if ours:
            policy = ppo.policy_loss(logprobs, case["old"], whitened, case["mask"], 0.2)
            value = ppo.value_loss(values, returns, case["mask"])
        else:
            policy, value = plain_losses(case, logprobs, values, whitened, returns, 0.2)
        (policy + 0.7 * value).backward()
        grads.append((policy.detach(), value.detach(), logprobs.grad, values.grad))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-10, rtol=1e-10)


def everything(case, coef=0.1):
    """All that PPO computes from one batch, with gradients."""
    mask = case["mask"]
    logprobs, values = case["new"].clone().requires_grad_(), case["new_values"].clone().requires_grad_()
    rewards = case["rewards"] + ppo.kl_rewards(case["old"], case["ref"], mask, coef)
    advantages, returns = ppo.gae(rewards, case["values"], mask, 0.99, 0.95)
    white = ppo.masked_whiten(advantages, mask)
    loss = ppo.policy_loss(logprobs, case["old"], white, mask, 0.2) + ppo.value_loss(values, returns, mask)
    loss.backward()
    group = torch.arange(len(mask)) // 2
    rloo = ppo.rloo_advantages(ppo.returns_to_go(rewards, mask, 0.99), group, mask)
    scalars = [
        loss.detach(),
        ppo.approx_kl(logprobs, case["old"], mask),
        ppo.clipfrac(logprobs, case["old"], white, mask, 0.2),
        ppo.masked_mean(case["old"] - case["ref"], mask),
    ]
    return torch.stack(scalars), (white, returns, rloo, logprobs.grad, values.grad)


@pytest.mark.parametrize("filler", [0.0, 1e6, math.inf, math.nan])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_outside_the_mask_matters(seed, filler):
    """Wider padding, holding anything: every number and gradient stays the same, and is 0 at the pads."""
    case = random_case(200 + seed)
    wide = {"lengths": case["lengths"], "mask": torch.nn.functional.pad(case["mask"], (0, 5))}
    for name, value in case.items():
        if name not in wide:
            wide[name] = torch.nn.functional.pad(value, (0, 5)).masked_fill(~wide["mask"], filler)
    scalars, tensors = everything(case)
    wide_scalars, wide_tensors = everything(wide)
    torch.testing.assert_close(wide_scalars, scalars, atol=1e-12, rtol=1e-12, equal_nan=True)
    T = case["mask"].size(1)
    for ours, wider in zip(tensors, wide_tensors, strict=True):
        torch.testing.assert_close(wider[:, :T], ours, atol=1e-12, rtol=1e-12)
        assert not wider[~wide["mask"]].any()


@pytest.mark.parametrize("filler", [1e6, math.inf, math.nan])
def test_advantages_outside_the_mask_do_not_matter(filler):
    """Those of the trainer are whitened, and 0 there; others need not be."""
    case = random_case(203)
    mask, found = case["mask"], []
    assert not mask.all()
    for outside in (0.0, filler):
        logprobs = case["new"].clone().requires_grad_()
        given = logprobs, case["old"], case["rewards"].masked_fill(~mask, outside), mask, 0.2
        loss = ppo.policy_loss(*given)
        loss.backward()
        found.append((loss.detach(), logprobs.grad, ppo.clipfrac(*given)))
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)


def test_shares_of_a_step_add_up():
    """Minibatches with the whole step's denominator give what one big batch gives."""
    case = random_case(7)
    while len(case["mask"]) < 4:
        case = random_case(len(case["mask"]) + 20)
    mask, n = case["mask"], case["mask"].sum()
    parts = [slice(0, 1), slice(1, 4), slice(4, None)]
    white = ppo.masked_whiten(case["rewards"], mask)
    whole = ppo.policy_loss(case["new"], case["old"], white, mask, 0.2)
    shares = [ppo.policy_loss(case["new"][p], case["old"][p], white[p], mask[p], 0.2, n) for p in parts]
    torch.testing.assert_close(sum(shares), whole)
    shares = [ppo.value_loss(case["values"][p], case["ref"][p], mask[p], n) for p in parts]
    torch.testing.assert_close(sum(shares), ppo.value_loss(case["values"], case["ref"], mask))


# -- conventions -----------------------------------------------------------------------------------------


def test_mask_counts_the_end_token_and_not_the_start():
    actions = torch.tensor([[0, 5, 6, 1, 0, 0], [0, 7, 1, 0, 0, 0], [0, 5, 5, 5, 5, 5]])
    assert action_mask(actions).tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_sentence_reward_belongs_to_the_choice_of_its_last_token():
    rewards = ppo.sentence_rewards([[3, 5], [], [1]], [[1.0, 0.2], [], [0.5]], length=5, neutral=0.5)
    expected = [[0, 0, 0.5, 0, -0.3], [0] * 5, [0] * 5]
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("columns, scores", [([[3]], [[0.1, 0.2]]), ([[6]], [[0.1]]), ([[0]], [[0.1]])])
def test_misplaced_scores_are_refused(columns, scores):
    with pytest.raises(ValueError):
        ppo.sentence_rewards(columns, scores, length=5)


def test_kl_reward_covers_every_real_position():
    """Released bug: the mask was shifted by one, so `</s>` was free and the first pad was not."""
    mask = torch.tensor([[True, True, False]])
    rewards = ppo.kl_rewards(torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -1.0, -9.0]]), mask, 0.5)
    assert rewards.tolist() == [[-0.5, 0.5, 0.0]]


@pytest.mark.parametrize("keep", [0, 10**6], ids=["computed-again", "kept"])
@pytest.mark.parametrize("chunk", [10, 50, 10**6], ids=["one-row", "blocks", "all"])
def test_head_logprobs_and_entropies_have_the_values_and_gradients_of_a_plain_softmax(monkeypatch, chunk, keep):
    """float64: logits in blocks of rows, the last one short, kept for the gradient or computed again, give what
    log_softmax of all logits gives."""
    monkeypatch.setattr(head_module, "CHUNK", chunk)
    monkeypatch.setattr(head_module, "CACHE", min(chunk, 22))
    monkeypatch.setattr(head_module, "KEEP", keep)
    g = torch.Generator().manual_seed(0)
    states = torch.randn(13, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (13,), generator=g)
    up = torch.randn(2, 13, generator=g, dtype=torch.float64)
    log_p = (states @ weight.T).log_softmax(-1)
    want = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    got = head_module.head_logprobs(states, weight, labels)
    for ours, plain in zip(got, want, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)
    for part in ([0], [1], [0, 1]):
        grads = [
            torch.autograd.grad(sum((up[i] * out[i]).sum() for i in part), (states, weight), retain_graph=True)
            for out in (got, want)
        ]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=1e-12)


def test_head_logprobs_in_fp32_at_the_real_vocabulary(monkeypatch):
    """fp32, 32,128 logits a row: values within 2e-5, gradients within 1e-5 of their norm of the plain path's."""
    g = torch.Generator().manual_seed(0)
    plain_states = torch.randn(40, 16, generator=g, requires_grad=True)
    plain_weight = torch.randn(32128, 16, generator=g, requires_grad=True)
    labels = torch.randint(0, 32128, (40,), generator=g)
    up = torch.randn(40, generator=g)
    log_p = (plain_states @ plain_weight.T).log_softmax(-1)
    want, entropy = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (want * up).sum().backward()
    for keep in (0, 2**25):
        monkeypatch.setattr(head_module, "KEEP", keep)
        states, weight = (one.detach().clone().requires_grad_() for one in (plain_states, plain_weight))
        got = head_module.head_logprobs(states, weight, labels)
        torch.testing.assert_close(got, (want, entropy), atol=2e-5, rtol=0)
        (got[0] * up).sum().backward()
        for ours, plain in ((states, plain_states), (weight, plain_weight)):
            assert (ours.grad - plain.grad).norm() <= 1e-5 * plain.grad.norm()


def test_logits_never_dominate_memory(monkeypatch):
    """Beyond KEEP numbers nothing of the logits' size is held for the backward pass, and no block is above CHUNK."""
    monkeypatch.setattr(head_module, "CHUNK", 1000)
    held, largest = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))
            return out

    states, weight = torch.randn(500, 3, requires_grad=True), torch.randn(100, 3, requires_grad=True)
    labels = torch.zeros(500, dtype=torch.long)
    for keep, least in ((0, 0), (10**6, 50_000)):
        monkeypatch.setattr(head_module, "KEEP", keep)
        held.clear(), largest.clear()
        with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            logprobs, _ = head_module.head_logprobs(states, weight, labels)
            kept = logprobs.grad_fn.kept
            logprobs.sum().backward()
        assert max(t.numel() for t in held) <= 1500 and (0 if kept is None else kept.numel()) == least
        assert max(largest) <= max(1500, least)  # kept logits are made at once


def test_logprobs_of_half_precision_states_are_fp32():
    g = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(2, 4, 500, generator=g)).bfloat16().requires_grad_()
    labels = torch.randint(0, 500, (2, 4), generator=g)
    got, entropy = head(logits, labels)
    log_p = logits.detach().double().log_softmax(-1)
    assert got.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(got.double(), log_p.gather(-1, labels[..., None]).squeeze(-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-4, rtol=1e-5)
    got.sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.isfinite().all()


@pytest.mark.parametrize("keep", [0, 10**6], ids=["computed-again", "kept"])
def test_sure_tokens_keep_their_gradient_in_half_precision(monkeypatch, keep):
    """bf16, labels of probability 0.999 and the like, as a trained model has them: 1 - p would be 0 or 0.004 of a
    probability that was rounded. Within the rounding of the gradient itself, as in float64 from the same logits."""
    monkeypatch.setattr(head_module, "KEEP", keep)
    states = torch.eye(16).bfloat16()  # the logits are the weights
    weight = torch.zeros(40, 16)
    weight[range(16), range(16)] = torch.linspace(8.5, 12, 16)
    weight, labels = weight.bfloat16(), torch.arange(16)
    plain = weight.double().requires_grad_()
    log_p = (states.double() @ plain.T).log_softmax(-1)
    assert 0.992 < log_p.exp().diag().min() and log_p.exp().diag().max() < 0.9999
    log_p.diag().sum().backward()
    weight.requires_grad_()
    head_module.head_logprobs(states, weight, labels)[0].sum().backward()
    torch.testing.assert_close(weight.grad.double(), plain.grad, rtol=2**-8, atol=0)


def test_head_logprobs_under_autocast_are_those_of_a_linear_layer_under_it():
    g = torch.Generator().manual_seed(0)
    states, labels = torch.randn(6, 16, generator=g), torch.randint(0, 50, (6,), generator=g)
    layer = torch.nn.Linear(16, 50, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = head_module.head_logprobs(states, layer.weight, labels)
        logits = layer(states)
    want = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().max() > 0


def test_entropy_of_a_flat_and_of_a_sure_softmax():
    flat, sure = torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)
    sure[..., 2] = 200.0
    labels = torch.full((1, 3), 2)
    assert head(flat, labels)[1].tolist() == [pytest.approx([math.log(8)] * 3)]
    logprobs, entropy = head(sure.requires_grad_(), labels)
    assert entropy.tolist() == [[0.0] * 3] == logprobs.tolist()
    (logprobs.sum() + entropy.sum()).backward()
    assert sure.grad.isfinite().all()


def test_clipfrac_counts_where_the_gradient_stops():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    logprobs = ratio.log().requires_grad_()
    ppo.policy_loss(logprobs, torch.zeros(1, 5), advantages, mask, 0.2).backward()
    assert (logprobs.grad == 0).tolist() == [[True, False, False, True, False]]
    assert ppo.clipfrac(logprobs, torch.zeros(1, 5), advantages, mask, 0.2).item() == pytest.approx(2 / 5)


def test_approx_kl_estimates_the_kl_from_old_to_new():
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    samples = torch.multinomial(old.exp(), 200_000, replacement=True, generator=g)[None]
    estimate = ppo.approx_kl(new[samples], old[samples], torch.ones_like(samples, dtype=torch.bool))
    exact = (old.exp() * (old - new)).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=0.05)
    assert ppo.approx_kl(old[samples], old[samples], torch.ones_like(samples, dtype=torch.bool)) == 0


def test_explained_variance():
    case = random_case(3)
    returns, mask = case["rewards"], case["mask"]
    args = SimpleNamespace(algo="ppo", entropy_coef=0.0, vf_coef=1.0, clip_range=0.2, vf_clip_range=None)

    def explained(values, returns):
        mb = ppo.MiniBatch(case["old"], case["ref"], case["values"], returns, case["rewards"])
        sums = [ppo.ppo_loss(case["new"][r], case["new"][r], values[r], ppo.MiniBatch(*(one[r] for one in mb)),
                             mask[r], args, 1)[1] for r in (slice(0, 1), slice(1, None))]  # fmt: skip
        return ppo.diagnostics(sum(sums).tolist(), args)["explained_variance"]  # sums of passes add up

    assert explained(returns + 4, returns) == pytest.approx(1)  # a constant error explains
    assert explained(torch.zeros_like(returns), returns) == pytest.approx(0)
    assert explained(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained(returns, torch.ones_like(returns)))


def test_value_loss_clipping():
    values, returns, old = torch.tensor([[2.0, 0.5]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.4]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert ppo.value_loss(values, returns, mask).item() == pytest.approx((4 + 0.25) / 2)
    clipped = ppo.value_loss(values, returns, mask, old_values=old, clip_range=0.05)
    assert clipped.item() == pytest.approx((4 + (0.45 - 1) ** 2) / 2)  # the larger error of the two, per position


def test_rloo_leaves_the_own_sample_out():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    rewards = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 9.0], [4.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    to_go = ppo.returns_to_go(rewards, mask, gamma=1.0)
    assert to_go.tolist() == [[3, 3, 2], [2, 1, 0], [4, 0, 0], [3, 2, 1]]
    advantages = ppo.rloo_advantages(to_go, torch.tensor([9, 9, 9, 4]), mask)
    expected = [[3 - 3, 3 - 0.5, 2 - 0], [2 - 3.5, 1 - 1.5, 0], [4 - 2.5, 0, 0], [0, 0, 0]]  # the last is alone
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32))
    assert advantages[:3, 0].sum() == 0


def test_whitening_of_constant_advantages_gives_zeros():
    for value in (0.0, 0.3, -1e4):
        x = torch.full((3, 4), value)
        mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
        white = ppo.masked_whiten(x, mask)
        assert white.isfinite().all() and white.abs().max() < 1e-2
    one = torch.tensor([[1.0, 3.0]])
    assert ppo.masked_whiten(one, one > 0).tolist() == [[pytest.approx(-1), pytest.approx(1)]]


def test_masked_mean_divides_by_the_mask_or_what_is_given():
    x, mask = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[True, True, False]])
    assert ppo.masked_mean(x, mask) == 1.5 and ppo.masked_mean(x, mask, 6) == 0.5
    assert ppo.masked_mean(x, torch.zeros_like(mask)) == 0


def test_the_loss_of_a_pass_and_its_diagnostics_are_those_of_a_plain_loop():
    """float64, a pass of a step with more positions than its own; entropy bonus and clipped values included."""
    case, total = random_case(11), 100
    g = torch.Generator().manual_seed(0)
    entropy, mask = torch.rand(case["mask"].shape, generator=g, dtype=torch.float64), case["mask"]
    args = SimpleNamespace(algo="ppo", entropy_coef=0.3, vf_coef=0.7, clip_range=0.2, vf_clip_range=0.1)
    mb = ppo.MiniBatch(case["old"], case["ref"], case["values"], case["rewards"], case["rewards"] - 1)
    loss, sums = ppo.ppo_loss(case["new"], entropy, case["new_values"], mb, mask, args, total)
    want = dict.fromkeys(ppo.SUMS, 0.0)
    for b, t in mask.nonzero().tolist():
        r = math.exp(case["new"][b, t] - case["old"][b, t])
        ref, A = float(case["ref"][b, t] - case["new"][b, t]), float(mb.advantages[b, t])
        R, V, V_old = (float(one[b, t]) for one in (mb.returns, case["new_values"], case["values"]))
        plain, clipped = -A * r, -A * min(max(r, 0.8), 1.2)
        near = V_old + min(max(V - V_old, -0.1), 0.1)
        found = {
            "policy_loss": max(plain, clipped), "value_loss": max((V - R) ** 2, (near - R) ** 2),
            "approx_kl": r - 1 - math.log(r), "kl_ref": r * (math.exp(ref) - 1 - ref), "entropy": float(entropy[b, t]),
            "clipfrac": float(clipped > plain), "ret": R, "ret2": R * R, "err": R - V, "err2": (R - V) ** 2, "n": 1,
        }  # fmt: skip
        want = {name: want[name] + found[name] for name in want}
    assert dict(zip(ppo.SUMS, sums.tolist(), strict=True)) == pytest.approx(want)
    assert loss.item() == pytest.approx(
        (want["policy_loss"] + 0.7 * want["value_loss"] - 0.3 * want["entropy"]) / total
    )
    means = ppo.diagnostics(sums.tolist(), args)
    n = int(mask.sum())
    assert means["positions"] == n and means["kl_ref"] == pytest.approx(want["kl_ref"] / n)
    assert means["loss"] == pytest.approx(loss.item() * total / n)


def test_statistics_of_rows_are_those_of_their_sentences():
    rows = random_rollouts(9)
    rows.tokens[rows.offsets[2] + rows.lengths[2] - 1] = 1  # rows 2 and 5 end with `</s>`
    rows.tokens[rows.offsets[5] + rows.lengths[5] - 1] = 1
    scores = [[0.1 * (i + j) % 1 for j in range(int(n))] for i, n in enumerate(rows.sentence_counts)]
    args = SimpleNamespace(neutral_score=0.4, gamma=0.9, gae_lambda=0.8, algo="ppo")
    data = ppo.compute_advantages(rows, scores, args, kl_coef=0.3)
    some = [2, 3, 5, 8]
    stats, flat = data.row_stats(some), [score for row in some for score in scores[row]]
    kl = [
        float((rows.logprobs - rows.ref_logprobs)[b : b + n].sum())
        for b, n in zip(rows.offsets, rows.lengths, strict=False)
    ]
    sentence = [sum(score - 0.4 for score in scores[row]) for row in some]
    assert stats["sentences"] == len(flat) and stats["mean_sentence_score"] == pytest.approx(sum(flat) / len(flat))
    assert stats["sentence_reward"] == pytest.approx(sum(sentence) / 4, abs=1e-6)
    assert stats["reward"] == pytest.approx(
        sum(s - 0.3 * kl[r] for s, r in zip(sentence, some, strict=False)) / 4, abs=1e-5
    )
    assert stats["length"] == pytest.approx(sum(int(rows.lengths[row]) for row in some) / 4)
    assert stats["share_ended"] == 0.5
    assert ppo.kl_per_rationale(rows).tolist() == pytest.approx(kl, abs=1e-5)
    empty = rows.select([row for row in range(9) if int(rows.sentence_counts[row]) == 0])
    none = ppo.compute_advantages(empty, [[] for _ in range(len(empty))], args, 0.3).row_stats(range(len(empty)))
    assert len(empty) and math.isnan(none["mean_sentence_score"])
