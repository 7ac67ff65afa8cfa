"""Sampling: what is stored is what the models say, drawn as asked, fixed by its seed, whoever else is in the batch."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from ares import decoding, devices
from ares.decoding import action_mask
from model import MultimodalT5Config, T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction
from rl import actor_critic, collection, minibatches, rollouts, sampling
from rl.sampling import Sampling
from teacher import handoff
from tests.pretended_gpu import PretendedGPU
from tests.rl import rl_tools


@pytest.fixture(scope="module")
def world(tmp_path_factory, sample, t5_tokenizer):
    """The folder of the tiny multimodal model."""
    root = tmp_path_factory.mktemp("sampling")
    data = rl_tools.make_data(root, sample, 6)
    return rl_tools.make_model(root / "model", data, t5_tokenizer)


def load(folder, value=False):
    cls = T5ForMultimodalGenerationValueFunction if value else T5ForMultimodalGeneration
    return cls.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models(world):
    policy, reference = load(world), load(world)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)  # another model than the policy
    return sampling.Models(policy, reference, load(world, value=True))


TEXTS = [
    "Question: Which is a fish?\nSolution:",
    "Question: Why?",
    "Question: Which of these is the longest? One, two",
]


def prompt_batch(t5_tokenizer, texts=TEXTS):
    batch = t5_tokenizer(texts, padding=True, return_tensors="pt")
    images = torch.randn(3, *rl_tools.PATCHES, generator=torch.Generator().manual_seed(1))[: len(texts)]
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "image_ids": images}


SOME = Sampling(k=3, do_sample=True, top_k=50, top_p=1.0, output_len=20)


def alone(prompt, row: int, k: int) -> dict:
    """One row's prompt without padding."""
    length = int(prompt["attention_mask"][row // k].sum())
    return {
        "input_ids": prompt["input_ids"][row // k, :length][None],
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "image_ids": prompt["image_ids"][row // k][None],
    }


def test_stored_numbers_are_those_of_one_plain_forward_pass_per_sample(models, t5_tokenizer, monkeypatch):
    """Bucketing by length, shared encodings and packed logits against a pass per sample without padding, full logits
    and their log_softmax: fp32, within 1e-4 (2e-6 was seen)."""
    monkeypatch.setattr(sampling, "SCORING_TOKENS", 80)  # several groups
    prompt = prompt_batch(t5_tokenizer)
    sampled = sampling.sample_batch(models, prompt, SOME, seed=7)
    actions = sampled["actions"]
    assert actions.shape[0] == 9 and actions.shape[1] <= 20
    mask = action_mask(actions)
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()  # real positions are a prefix: pad is never drawn
    assert len(set(mask.sum(1).tolist())) > 2  # ragged
    for row in range(9):
        n = int(mask[row].sum())
        how = alone(prompt, row, 3) | {"decoder_input_ids": actions[row, :n][None]}
        with torch.no_grad():
            for name, one in (("logprobs", models.policy), ("ref_logprobs", models.reference)):
                logp = one(**how).logits[0].log_softmax(-1)  # the full softmax, no top-k
                want = logp[torch.arange(n), actions[row, 1 : n + 1]]
                torch.testing.assert_close(sampled[name][row, :n], want, atol=1e-4, rtol=0)
            want = models.value_function(**how)[0]
        torch.testing.assert_close(sampled["values"][row, :n], want, atol=1e-4, rtol=0)
        assert all((sampled[name][row, n:] == 0).all() for name in ("logprobs", "ref_logprobs", "values"))
    assert (sampled["logprobs"] - sampled["ref_logprobs"]).abs().max() > 1e-3


def text_policy(tied: bool):
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=90, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="relu" if tied else "gated-gelu", tie_word_embeddings=tied, initializer_factor=0.3,
    )  # fmt: skip
    return T5ForMultimodalGeneration(config).eval().requires_grad_(False)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_step_decoder_gives_the_logits_of_a_whole_pass(tied, monkeypatch):
    """Every position, while rows and whole questions leave the batch and memory grows: fp32, within 1e-4."""
    monkeypatch.setattr(decoding, "FIRST_LENGTH", 3)
    policy = text_policy(tied)
    ids = torch.randint(2, 90, (3, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    k, L = 2, 12
    actions = torch.cat([torch.zeros(6, 1, dtype=torch.long), torch.randint(2, 90, (6, L - 1))], 1)
    whole = policy(
        input_ids=ids.repeat_interleave(k, 0), attention_mask=mask.repeat_interleave(k, 0), decoder_input_ids=actions
    ).logits
    decoder = decoding.StepDecoder(policy, policy.encode(ids, mask).last_hidden_state, mask, k)
    live = torch.arange(6)
    leave = {2: [0, 1, 3, 4, 5], 4: [1, 2, 3], 7: [0, 2], 9: [1]}  # places among those present: all of 2 and 3 go
    for t in range(L):
        if t in leave:
            rows = torch.tensor(leave[t])
            decoder.keep(rows)
            live = live[rows]
        torch.testing.assert_close(decoder.step(actions[live, t]), whole[live, t], atol=1e-4, rtol=0)
    assert decoder.questions == 1 and decoder.layers[0].keys.shape[::2] == (1, 12)


def test_sampling_is_fixed_by_its_seed_and_encodes_each_prompt_once(models, t5_tokenizer, monkeypatch):
    prompt = prompt_batch(t5_tokenizer)
    seen = []
    encode = type(models.policy).encode
    monkeypatch.setattr(
        type(models.policy), "encode", lambda self, *a, **k: seen.append(self) or encode(self, *a, **k)
    )
    first = sampling.sample_batch(models, prompt, SOME, seed=7)
    assert [id(one) for one in seen] == [id(models.policy), id(models.reference), id(models.value_function)]
    torch.manual_seed(1)  # the global generator has no part in it
    again, other = (sampling.sample_batch(models, prompt, SOME, seed=seed) for seed in (7, 8))
    assert torch.equal(first["actions"], again["actions"])
    assert not (first["actions"].shape == other["actions"].shape and torch.equal(first["actions"], other["actions"]))


def test_a_rationale_does_not_depend_on_who_leaves_the_batch_and_when(models, t5_tokenizer, monkeypatch):
    prompt = prompt_batch(t5_tokenizer)
    found = []
    for share in (0.0, 0.5, 1.0):  # nobody ever leaves; half must have ended; each at once
        monkeypatch.setattr(decoding, "KEEP_SHARE", share)
        found.append(sampling.sample_batch(models, prompt, SOME, seed=5)["actions"])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    lengths = action_mask(found[0]).sum(1)
    assert lengths.min() < lengths.max()


def test_logprobs_of_writing_are_those_of_scoring_and_in_half_precision_they_are(models, t5_tokenizer):
    """fp32: what the steps gave, within 1e-5 of a whole pass. bf16: the whole pass itself, as training makes it."""
    prompt = prompt_batch(t5_tokenizer)
    sampled = sampling.sample_batch(models, prompt, SOME, seed=7)
    with torch.no_grad():
        whole = sampling.evaluate_actions(models.policy, prompt, sampled["actions"], 3)
    torch.testing.assert_close(sampled["logprobs"], whole, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        sampled = sampling.sample_batch(models, prompt, SOME, seed=7)
        whole = sampling.evaluate_actions(models.policy, prompt, sampled["actions"], 3)
    assert torch.equal(sampled["logprobs"], whole) and sampled["logprobs"].dtype == torch.float32


@pytest.mark.parametrize("value", [False, True], ids=["policy", "value"])
def test_halved_weights_give_the_numbers_of_autocast(world, t5_tokenizer, value):
    """bf16: bit for bit, since autocast rounds the same weights at every call."""
    prompt = prompt_batch(t5_tokenizer)
    actions = torch.cat([torch.zeros(9, 1, dtype=torch.long), torch.arange(9 * 11).view(9, 11) + 50], 1)
    whole, half = load(world, value), actor_critic.cast_linears_bf16(load(world, value))
    size = [sum(p.numel() * p.element_size() for p in one.parameters()) for one in (whole, half)]
    assert size[1] < 0.8 * size[0]  # most of this tiny model is its embedding
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        scores = [sampling.evaluate_actions(one, prompt, actions, 3, value=value) for one in (whole, half)]
        assert torch.equal(*scores)
        if not value:
            states = actor_critic.encode(whole, prompt)
            written = [sampling.generate(one, states, prompt["attention_mask"], SOME, 3) for one in (whole, half)]
            assert torch.equal(written[0][0], written[1][0])


@pytest.mark.parametrize("kept", ["whole", "halved", "trained"])
def test_values_are_not_rounded_to_half_precision(world, t5_tokenizer, kept):
    """Under autocast the value head is computed in fp32, of whatever states: GAE takes differences of neighbours."""
    prompt = prompt_batch(t5_tokenizer)
    model = load(world, value=True)
    with torch.no_grad():
        model.v_head[2].bias.fill_(1.0)  # bf16 near 1: steps of 0.008
    if kept == "halved":
        model = actor_critic.cast_linears_bf16(model)
        assert {p.dtype for p in model.v_head.parameters()} == {torch.float32}
        assert model.decoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.bfloat16
    model.requires_grad_(kept == "trained")
    actions = torch.cat([torch.zeros(3, 1, dtype=torch.long), torch.arange(3 * 11).view(3, 11) + 50], 1)
    heads, head = [], model.v_head.forward
    model.v_head.forward = lambda states: heads.append((states, head(states)[..., 0])) or head(states)
    with torch.autocast("cpu", torch.bfloat16):
        states = actor_critic.encode(model, prompt)
        plain = model(**prompt, decoder_input_ids=actions[:, :-1])
        packed = actor_critic.state_values(model, states, prompt["attention_mask"], None, actions)
        joint = actor_critic.ActorCritic(model, model)(prompt, None, actions, None, with_policy=False)[2]
    assert len(heads) == 3
    for values in (plain, packed, joint):
        assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
        torch.testing.assert_close(values, plain, atol=1e-6, rtol=0)
    for states, values in heads:
        torch.testing.assert_close(head(states.float())[..., 0], values, atol=1e-6, rtol=0)
    coarse = heads[0][0].detach().bfloat16()
    assert torch.equal(model.values(coarse), model.values(coarse.float()))
    if kept == "trained":
        joint.sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.v_head.parameters())


def test_rows_leave_when_they_have_ended(models, t5_tokenizer, monkeypatch):
    """The work done follows the real lengths, not the longest."""
    prompt, sizes = prompt_batch(t5_tokenizer), []
    step = decoding.StepDecoder.step
    monkeypatch.setattr(decoding.StepDecoder, "step", lambda self, t: sizes.append(len(t)) or step(self, t))
    monkeypatch.setattr(decoding, "KEEP_SHARE", 1.0)
    actions = sampling.sample_batch(models, prompt, SOME, seed=5)["actions"]
    assert sum(sizes) == int(action_mask(actions).sum()) < 9 * max(len(sizes), 1)


@pytest.mark.parametrize("chosen", [SOME, Sampling(k=4, do_sample=True, top_k=0, top_p=0.9, output_len=70)])
def test_fixed_shapes_draw_the_same_tokens(models, t5_tokenizer, chosen, monkeypatch):
    """--decode_graph on, as it decodes without a GPU."""
    prompt, found = prompt_batch(t5_tokenizer), []
    monkeypatch.setattr(decoding, "FIRST_LENGTH", 4)
    for mode in ("off", "on"):
        monkeypatch.setattr(decoding, "graph_mode", mode)
        found.append(sampling.sample_batch(models, prompt, chosen, seed=3))
    assert torch.equal(found[0]["actions"], found[1]["actions"]) and found[0]["actions"].shape[1] > 9
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_greedy_is_the_librarys_greedy_and_top_k_one(models, t5_tokenizer):
    prompt = prompt_batch(t5_tokenizer)
    greedy = sampling.sample_batch(models, prompt, Sampling(1, False, 20, 1.0, 16), seed=1)["actions"]
    one = sampling.sample_batch(models, prompt, Sampling(2, True, 1, 1.0, 16), seed=1)["actions"]
    assert torch.equal(one, greedy.repeat_interleave(2, 0))
    library = models.policy.generate(**prompt, max_length=16, do_sample=False, num_beams=1, suppress_tokens=[0])
    for row in range(3):
        ours = greedy[row][action_mask(greedy)[row].nonzero()[:, 0] + 1]
        assert library[row, 1 : len(ours) + 1].tolist() == ours.tolist()
        assert not library[row, len(ours) + 1 :].any() and len(ours) <= 15


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.2])
@pytest.mark.parametrize("top_k", [0, 1, 5, 20])
def test_candidates_are_those_of_the_librarys_warpers(top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = 2 * torch.randn(30, 2500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = logits.clone()
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    want = want.softmax(-1)
    ids, probabilities = sampling.candidates(logits.clone(), Sampling(1, True, top_k, top_p, 9))
    got = probabilities.double() / probabilities.double().sum(-1, keepdim=True)
    if ids is not None:
        got = torch.zeros_like(want).scatter(1, ids, got)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_top_p_is_reached_by_the_fewest_tokens():
    """Two of four equal tokens reach 0.5 exactly; a third is not needed."""
    _, probabilities = sampling.candidates(torch.zeros(1, 4), Sampling(1, True, 0, 0.5, 9))
    assert (probabilities > 0).sum() == 2


def test_draws_follow_their_probabilities_and_never_give_the_pad():
    logits = torch.tensor([3.0, 1.0, 0.0, 2.0, -1.0, 0.5]).repeat(40_000, 1)
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    for how, kept in ((Sampling(1, True, 0, 1.0, 9), [1, 2, 3, 4, 5]), (Sampling(1, True, 3, 1.0, 9), [1, 3, 5])):
        drawn = sampling.draw(logits.clone(), how, u)
        want = torch.zeros(6).index_copy(0, torch.tensor(kept), logits[0, kept].softmax(-1))
        share = torch.bincount(drawn, minlength=6) / 40_000
        assert share[0] == 0 and ((share > 0) == (want > 0)).all()
        torch.testing.assert_close(share, want, atol=0.01, rtol=0)  # four standard deviations
    every = Sampling(1, True, 0, 1.0, 9)
    assert sampling.draw(logits[:2].clone(), every, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 5]
    ends = sampling.draw(logits[:2].clone(), Sampling(1, True, 3, 1.0, 9), torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [3, 5]


@pytest.mark.parametrize("size", [32128, 2500, 1031])
def test_top_is_topk(size):
    logits = torch.randn(7, size, generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 50):
        values, ids = sampling.top(logits, k)
        want = logits.topk(k)
        assert torch.equal(values, want.values) and torch.equal(ids, want.indices)


def test_groups_of_like_length_cost_least():
    assert minibatches.length_groups([5, 5, 5]) == [[0, 1, 2]]
    assert minibatches.length_groups([10, 300, 12, 290]) == [[1, 3], [2, 0]]
    g = torch.Generator().manual_seed(0)
    for n, tokens in itertools.product((1, 2, 5, 6), (150, 300, math.inf)):
        lengths = torch.randint(1, 200, (n,), generator=g).tolist()
        groups = minibatches.length_groups(lengths, tokens)
        assert sorted(row for rows in groups for row in rows) == list(range(n))
        assert all(len(rows) == 1 or len(rows) * lengths[rows[0]] <= tokens for rows in groups)
        cuts = [[0, *cut, n] for r in range(n) for cut in itertools.combinations(range(1, n), r)]
        got = sum(len(rows) * lengths[rows[0]] + minibatches.GROUP_COST for rows in groups)
        assert got == min(cost_of(cut, sorted(lengths, reverse=True), tokens) for cut in cuts)
    assert minibatches.length_groups([4, 4, 4, 4, 4], 8) == [[0], [1, 2], [3, 4]]
    assert minibatches.length_groups([]) == []


def cost_of(edges: list[int], falling: list[int], tokens: float) -> float:
    groups = [(b - a, falling[a]) for a, b in itertools.pairwise(edges)]
    if any(n > 1 and n * longest > tokens for n, longest in groups):
        return math.inf
    return sum(n * longest + minibatches.GROUP_COST for n, longest in groups)


@pytest.mark.parametrize("question", [None, [0, 2, 2, 1]], ids=["own", "shared"])
def test_groups_of_like_length_change_no_number(models, t5_tokenizer, monkeypatch, question):
    """Encoder and decoder in several groups against one padded pass: states, log-probabilities and values of real
    positions, fp32 within 1e-5."""
    prompt = prompt_batch(t5_tokenizer)
    prompt = {name: tensor[[0, 1, 2, 1]] for name, tensor in prompt.items()} if question is None else prompt
    question = None if question is None else torch.tensor(question)
    actions = torch.zeros(4, 13, dtype=torch.long)
    for row, n in enumerate((3, 12, 7, 11)):
        actions[row, 1 : n + 1] = torch.arange(100, 100 + n)
    mask, found = action_mask(actions), []
    for cost in (10**6, 0, 4):  # one group; a group for each length; two rows whose prompts differ in each group
        monkeypatch.setattr(minibatches, "GROUP_COST", cost)
        states = actor_critic.encode(models.policy, prompt)
        real = states * prompt["attention_mask"][..., None]
        how = (states, prompt["attention_mask"], question, actions)
        logprobs, entropy = actor_critic.policy_logprobs(models.policy, *how, devices.flat_index(mask))
        values = actor_critic.state_values(models.value_function, *how) * mask
        found.append((real, logprobs, entropy, values))
        assert len(minibatches.length_groups([3, 12, 7, 11])) == {10**6: 1, 0: 4, 4: 2}[cost]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], atol=1e-5, rtol=1e-5)


def test_masks_as_a_gpu_gets_them_change_no_number(world, t5_tokenizer, monkeypatch):
    """Four-dimensional masks under SDPA, here on the CPU: the same numbers at real positions, of all three ways in."""
    model, value, prompt = load(world), load(world, value=True), prompt_batch(t5_tokenizer)
    mask, ids = prompt["attention_mask"], torch.arange(10, 31).view(3, 7)
    assert mask.min() == 0 and devices.expanded_mask(mask, model) is mask
    seen, made = [], devices.expanded_mask
    for one in (model, value):
        one.set_attn_implementation("sdpa")
    found = []
    for gpus in (("cuda",), ("cuda", "cpu")):
        monkeypatch.setattr(devices, "GPUS", gpus)
        seen.append(made(mask, model).shape)
        how = prompt | {"decoder_input_ids": ids}
        states = model.encode(**prompt)[0]
        found.append((states[mask.bool()], model(**how).logits, value(**how)))
    assert seen == [mask.shape, (3, 1, 1, mask.size(1))]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    model.set_attn_implementation("eager")
    assert devices.expanded_mask(mask, model) is mask


def test_an_expanded_view_reaches_a_gpu_although_torch_cannot_pin_it(monkeypatch):
    """Here without a GPU: what torch does to pin a tensor (the same strides, then a copy), and no move."""

    def pinned(tensor, *device):
        storage = torch.UntypedStorage(
            4 * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
        )
        return torch.empty(0).set_(storage, 0, tensor.shape, tensor.stride()).copy_(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: tensor)
    absent, repeated, plain = (
        torch.zeros(1, 1, 1).expand(3, 5, 8),
        torch.randn(3, 8)[:, None].expand(-1, 5, -1),
        torch.randn(3, 8),
    )
    for tensor in (absent, repeated, plain):
        there = devices.to_device(tensor, "cuda")
        assert torch.equal(there, tensor) and there.stride() == tensor.stride()


def test_columns_and_export_follow_the_given_ids(models, t5_tokenizer, tmp_path):
    sampled = sampling.sample_batch(models, prompt_batch(t5_tokenizer, TEXTS[:2]), SOME, seed=3)
    rows = rollouts.to_rollouts(sampled, ["11", "12"], 3, rank=1, tokenizer=t5_tokenizer)
    assert rows.keys() == ["0/11", "1/11", "2/11", "0/12", "1/12", "2/12"]
    assert int(rows.sentence_counts.sum()) > 0
    for row in range(6):
        assert all(1 <= column <= int(rows.lengths[row]) for column in rows.row_columns(row))
    collection.export(rows, tmp_path, t5_tokenizer)
    items = handoff.iter_items(tmp_path)
    assert {(i.action, i.rank, i.qid) for i in items} == {
        (rows.action[r], 1, rows.qids[r]) for r in rollouts.rows_with_sentences(rows)
    }
    for item in items:
        row = rows.keys().index(f"{item.action}/{item.qid}")
        assert len(handoff.read_rationale(item.folder)) == int(rows.sentence_counts[row])


def test_offloaded_models_keep_their_weights_on_the_cpu_and_give_the_same_numbers(world, t5_tokenizer, monkeypatch):
    """One model at a time has a copy on the pretended GPU; nothing is copied back."""
    prompt, found = prompt_batch(t5_tokenizer), []
    for offload in (False, True):
        parts = [load(world), load(world), load(world, value=True)]
        evaluate, moved = sampling.evaluate_actions, []
        with PretendedGPU(monkeypatch) as gpu:
            gpu.take(*parts[: 1 if offload else 3])
            models = sampling.Models(*parts, offload=offload)
            offloaded = [p for one in parts[1:] for p in one.parameters()]
            home = [p.data_ptr() for p in offloaded]

            def watched(model, *args, gpu=gpu, parts=parts, moved=moved, evaluate=evaluate, **kwargs):
                moved.append([all(map(gpu.holds, one.parameters())) for one in parts])
                return evaluate(model, *args, **kwargs)

            monkeypatch.setattr(sampling, "evaluate_actions", watched)
            for _ in range(2):
                found.append(sampling.sample_batch(models, devices.to_device(prompt, "cpu"), SOME, seed=7))
            assert not any("both sides" in wait or "blocks" in wait for wait in gpu.waits), gpu.waits
        monkeypatch.undo()
        assert moved == ([[True, True, False], [True, False, True]] * 2 if offload else [[True] * 3] * 4)
        assert home == [p.data_ptr() for p in offloaded]
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_reference_that_is_the_policy_is_not_scored_again(world, t5_tokenizer, monkeypatch, dtype):
    """Against a second model of the same weights: the same bits, but for the reference in fp32: its numbers are those
    that the policy wrote with, a second model's those of a whole pass (within 2e-6)."""
    policy, value, prompt, found, encoded = load(world), load(world, value=True), prompt_batch(t5_tokenizer), [], []
    encode = type(policy).encode
    monkeypatch.setattr(type(policy), "encode", lambda *a, **k: encoded.append(1) or encode(*a, **k))
    for reference in (load(world), policy):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            found.append(sampling.sample_batch(sampling.Models(policy, reference, value), prompt, SOME, seed=7))
    assert len(encoded) == 3 + 2
    close = 2e-6 if dtype is torch.float32 else 0
    for name, tensor in found[0].items():
        atol = close if name == "ref_logprobs" else 0
        torch.testing.assert_close(found[1][name], tensor, atol=atol, rtol=0)
    assert torch.equal(found[1]["ref_logprobs"], found[1]["logprobs"])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_policy_logprobs_are_those_of_the_models_own_logits(tied):
    """A tied T5 scales its states before the head: log-probabilities and entropies in fp32 within 1e-5."""
    policy = text_policy(tied)
    assert (policy.config.head_scale != 1) == tied
    ids, mask = torch.randint(2, 90, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    actions = torch.cat([torch.zeros(2, 1, dtype=torch.long), torch.randint(2, 90, (2, 7))], 1)
    actions[1, 5:] = 0
    real = action_mask(actions)
    log_p = policy(input_ids=ids, attention_mask=mask, decoder_input_ids=actions[:, :-1]).logits.log_softmax(-1)
    states = actor_critic.encode(policy, {"input_ids": ids, "attention_mask": mask})
    index = devices.flat_index(real)
    logprobs, entropy = actor_critic.policy_logprobs(policy, states, mask, None, actions, index)
    want = log_p.gather(-1, actions[:, 1:, None]).squeeze(-1) * real
    torch.testing.assert_close(logprobs, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1) * real, atol=1e-5, rtol=1e-5)
    again, none = actor_critic.policy_logprobs(policy, states, mask, None, actions, index, with_entropy=False)
    torch.testing.assert_close(again, logprobs, atol=1e-6, rtol=0)
    assert not none.any()


def test_rows_of_one_question_share_its_encoding_and_its_gradient(models, t5_tokenizer):
    """Encoded once for three rows against once for each row: values and gradients, fp32 within 1e-5."""
    prompt = prompt_batch(t5_tokenizer)
    question = torch.tensor([2, 0, 2, 1, 2])
    actions = torch.cat([torch.zeros(5, 1, dtype=torch.long), torch.randint(3, 900, (5, 7))], 1)
    places = devices.flat_index(torch.ones(5, 7, dtype=torch.bool))
    model = actor_critic.ActorCritic(models.policy, models.value_function).requires_grad_(True)
    found = []
    for rows in (question, None):
        given = prompt if rows is not None else {name: tensor[question] for name, tensor in prompt.items()}
        out = model(given, rows, actions, places)
        names, parameters = zip(*model.named_parameters(), strict=True)
        loss = sum((one * torch.linspace(-1, 1, 35).view(5, 7)).sum() for one in out)
        found.append((out, torch.autograd.grad(loss, parameters, allow_unused=True)))
    model.requires_grad_(False)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for name, one, other in zip(names, found[0][1], found[1][1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.gpu
def test_on_a_gpu_the_same_ids_get_the_same_numbers(monkeypatch):
    """fp32 on the GPU against the CPU within 1e-3; then bf16 with halved weights from end to end. Random weights and
    prompts, so that nothing has to be there but a GPU."""
    monkeypatch.setattr(decoding, "graph_mode", "auto")
    policy, value = rl_tools.small_models(torch.float32)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(2, rl_tools.SMALL_VOCABULARY, (3, 8), generator=g), torch.ones(3, 8, dtype=torch.long)
    ids[1, 6:] = mask[1, 6:] = 0
    prompt = {"input_ids": ids, "attention_mask": mask}
    prompt["image_ids"] = torch.randn(3, *rl_tools.SMALL_PATCHES, generator=g)
    there = {name: tensor.cuda() for name, tensor in prompt.items()}
    one = [model.requires_grad_(False) for model in (policy, reference, value)]
    two = [copy.deepcopy(model).cuda() for model in one]
    how = Sampling(k=3, do_sample=True, top_k=5, top_p=1.0, output_len=80)  # beyond the cache's first capacity
    sampled = sampling.sample_batch(sampling.Models(*two), there, how, seed=7)
    for name, model in zip(("logprobs", "ref_logprobs", "values"), one, strict=True):
        want = sampling.evaluate_actions(model, prompt, sampled["actions"], 3, value=name == "values")
        torch.testing.assert_close(sampled[name], want, atol=1e-3, rtol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        sampled = sampling.sample_batch(sampling.Models(*map(actor_critic.cast_linears_bf16, two)), there, how, seed=7)
    assert all(sampled[name].isfinite().all() for name in ("logprobs", "ref_logprobs", "values"))
    assert decoding.graph_mode == "auto", "a capture failed"
