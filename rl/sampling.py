"""Sampling: k rationales for each prompt of a batch, and what policy, reference and value function say of them.

Every model encodes each prompt once, whatever k. The policy's decoder runs one position at a time over its own keys
and values; those of the prompt are held once per question, not per rationale; a rationale that has ended leaves the
batch. A rationale depends on its seed, its row and its prompt alone: row i draws position t with the number u[i, t],
so that nothing changes when other rows leave.

Sampling truncates the distribution to top-k / top-p, while log-probabilities come from the full softmax, as in the
released code. The pad token is never drawn: it means "nothing here" in every mask. Left out: CUDA graphs, and a static
shape for them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl import actor_critic, ppo

EOS = 1
SCORING_TOKENS = 16384  # decoder positions scored at once
FIRST_LENGTH = 64  # positions that keys and values have room for at first; doubled when they are full
KEEP_SHARE = 0.875  # rows that have ended leave once they are more than an eighth
LOOK_EVERY = 8  # steps between looks at which rows have ended, on a GPU, where a look means waiting for it
BLOCK = 128  # top-k looks through this many logits at once


@dataclass(frozen=True)
class Sampling:
    """How rationales are drawn. `k` is the number per question; temperature is 1; `output_len` counts the start."""

    k: int
    do_sample: bool
    top_k: int
    top_p: float
    output_len: int


@dataclass
class Models:
    """The models that sampling needs, in eval mode. Without a value function (RLOO) every value is 0.

    `offload`: reference and value function lie on the CPU while the policy writes, and come to its device in turn.
    """

    policy: nn.Module
    reference: nn.Module
    value_function: nn.Module | None
    offload: bool = False

    def __post_init__(self):
        self.device = next(self.policy.parameters()).device
        self._park(self.reference, self.value_function)

    def _park(self, *models) -> None:
        for model in models:
            if self.offload and model is not None:
                model.to("cpu")

    @contextlib.contextmanager
    def at_work(self, model):
        """`model` on the policy's device for the length of a `with` block."""
        model.to(self.device)
        yield model
        self._park(model)


@torch.no_grad()
def sample_batch(models: Models, prompt: dict[str, Tensor], sampling: Sampling, seed: int) -> dict[str, Tensor]:
    """Draw k rationales for each of B prompts and score them; every model encodes each prompt once.

    Returns actions (B*k, L) int64, rows of one question side by side, and logprobs, ref_logprobs, values
    (B*k, L-1) float32 with zeros outside the mask, all on the CPU.
    """
    states = actor_critic.encode(models.policy, prompt)  # (B, S, d)
    actions, logprobs = write(models.policy, states, prompt["attention_mask"], sampling, seed)
    if torch.is_autocast_enabled(states.device.type):
        # in half precision a step and a whole pass round differently: what counts is the pass that training makes
        logprobs = score(models.policy, prompt, actions, sampling.k, states=states)
    out = {"actions": actions, "logprobs": logprobs}
    with models.at_work(models.reference) as reference:
        out["ref_logprobs"] = score(reference, prompt, actions, sampling.k)
    if models.value_function is None:
        out["values"] = torch.zeros_like(out["logprobs"])
    else:
        with models.at_work(models.value_function) as value_function:
            out["values"] = score(value_function, prompt, actions, sampling.k, value=True)
    return out


def score(
    model: nn.Module, prompt: dict[str, Tensor], actions: Tensor, k: int, value: bool = False, states=None
) -> Tensor:
    """Log-probabilities of `actions` (B*k, L) by a policy, or values: (B*k, L-1) float32 on the CPU, 0 in padding.

    Rows of like length share a forward pass.
    """
    device = prompt["input_ids"].device
    states = actor_critic.encode(model, prompt) if states is None else states
    mask = ppo.action_mask(actions)  # on the CPU, as everything that decides about shapes
    lengths = mask.sum(1)
    out, found = torch.zeros(mask.shape), []
    for rows in length_groups(lengths, SCORING_TOKENS):
        T = int(lengths[rows[0]])
        chunk, real = actor_critic.to_device(actions[rows, : T + 1], device), mask[rows, :T]
        question = actor_critic.to_device(rows // k, device)
        if value:
            scores = actor_critic.values(model, states, prompt["attention_mask"], question, chunk)
        else:
            places = actor_critic.places_of(real, device)
            scores, _ = actor_critic.policy_logprobs(model, states, prompt["attention_mask"], question, chunk, places)
        found.append((rows, real, scores))
    for rows, real, scores in found:  # not sooner: to fetch is to wait for a GPU
        out[rows, : real.size(1)] = scores.float().cpu().masked_fill(~real, 0)
    return out


def length_groups(lengths: Tensor, tokens: int) -> list[Tensor]:
    """Rows (n,) in groups by falling length, each of at most `tokens` positions with its padding (one row at least).

    A group also ends where a row is shorter than two thirds of its longest.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    groups: list[list[int]] = []
    for row in order.tolist():
        longest = int(lengths[groups[-1][0]]) if groups else 0
        fits = groups and longest * (len(groups[-1]) + 1) <= tokens and 3 * int(lengths[row]) >= 2 * longest
        if not fits:
            groups.append([])
        groups[-1].append(row)
    return [torch.tensor(group) for group in groups]


# -- writing ---------------------------------------------------------------------------------------------


def write(
    policy: nn.Module, states: Tensor, attention_mask: Tensor, sampling: Sampling, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw k rationales for each of Q encoded prompts: actions (Q*k, L) int64, L at most `output_len`, and their
    log-probabilities under the full softmax (Q*k, L-1) float32, 0 in padding; both on the CPU."""
    device, rows = states.device, len(states) * sampling.k
    u = numbers(rows, sampling.output_len, seed).to(device)
    actions = torch.zeros(rows, sampling.output_len, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, sampling.output_len - 1, device=device)
    decoder = StepDecoder(policy, states, attention_mask, sampling.k)
    live = torch.arange(rows, device=device)  # the rows that are being written
    tokens, ended = actions[:, 0], torch.zeros(rows, dtype=torch.bool, device=device)
    look_every = 1 if device.type == "cpu" else LOOK_EVERY
    for t in range(1, sampling.output_len):
        logits = decoder.step(tokens)
        log_z = logits.float().logsumexp(-1)
        tokens = draw(logits, sampling, u[live, t]).masked_fill(ended, 0)
        actions[live, t] = tokens
        logprobs[live, t - 1] = logits.gather(1, tokens[:, None])[:, 0].float() - log_z
        ended |= tokens == EOS
        if t % look_every:
            continue
        left = (~ended).nonzero()[:, 0]
        if len(left) == 0:
            break
        if len(left) <= KEEP_SHARE * len(live):
            decoder.keep(left)
            live, tokens, ended = live[left], tokens[left], ended[left]
    actions = actions.cpu()
    mask = ppo.action_mask(actions)
    T = int(mask.sum(1).max())
    return actions[:, : T + 1], logprobs.cpu().masked_fill(~mask, 0)[:, :T]


def numbers(rows: int, length: int, seed: int) -> Tensor:
    """What every position is drawn with, (rows, length) in [0, 1); alike on every device."""
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, sampling: Sampling, u: Tensor) -> Tensor:
    """One token for each row of logits (n, V), from numbers u (n,) in [0, 1): the first whose cumulated probability,
    likeliest first, exceeds u. Never the pad."""
    logits[:, 0] = -torch.inf
    if not sampling.do_sample:
        return logits.argmax(-1)
    ids, probabilities = candidates(logits, sampling)
    cumulated = probabilities.double().cumsum(-1)
    index = (cumulated <= u[:, None] * cumulated[:, -1:]).sum(-1)  # in fp64 u < 1 never reaches the end
    return index if ids is None else ids.gather(1, index[:, None])[:, 0]


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """What may be drawn, (n, m) token ids (None: all, by id) and their probabilities, not normalised: the `top_k`
    likeliest (0: all), of these the fewest whose share of the mass reaches `top_p`."""
    V = logits.size(-1)
    if 0 < sampling.top_k < V:
        values, ids = top(logits, sampling.top_k)
    elif sampling.top_p < 1:
        values, ids = logits.sort(-1, descending=True)
    else:
        return None, logits.float().softmax(-1)
    probabilities = values.float().softmax(-1)
    if sampling.top_p < 1:
        before = probabilities.double().cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    return ids, probabilities


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)`, on a CPU some times faster: the k largest lie in the k blocks with the largest maxima."""
    n, V = logits.shape
    if logits.device.type != "cpu" or V < 8 * BLOCK or k * BLOCK > V // 2:
        return logits.topk(k)
    logits = F.pad(logits, (0, -V % BLOCK), value=-torch.inf) if V % BLOCK else logits
    blocks = logits.view(n, -1, BLOCK)
    _, best = blocks.amax(-1).topk(k)  # (n, k)
    values, index = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(k)
    return values, best.gather(1, index // BLOCK) * BLOCK + index % BLOCK


@dataclass
class _Layer:
    """One block of the decoder with what it remembers: of the rows (n, H, room, D), of the prompts (Q, H, S, D)."""

    block: nn.Module
    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class StepDecoder:
    """T5's decoder one position at a time, for k rows of each of Q questions, in eval mode and without gradients.

    The library's own layers do the work; what is added is their memory: a row's keys and values have room ahead, so
    that a step copies nothing, and a prompt's are shared by its rows.
    """

    def __init__(self, policy: nn.Module, states: Tensor, attention_mask: Tensor, k: int):
        self.policy, self.length = policy, 0
        self.heads, self.dim = policy.config.num_heads, policy.config.d_kv
        self.slots = None  # (n,) places of the rows in (Q, k); None: all of them are there
        self.k, self.questions = k, len(states)
        self.mask = attention_mask.bool()[:, None, None]  # (Q, 1, 1, S)
        self.layers = []
        for block in policy.decoder.block:
            attention = block.layer[1].EncDecAttention
            keys, values = (self._split(linear(states)) for linear in (attention.k, attention.v))
            none = keys.new_empty(len(states) * k, self.heads, 0, self.dim)
            self.layers.append(_Layer(block, keys, values, none, none))
        self._grow(FIRST_LENGTH)

    def _split(self, x: Tensor) -> Tensor:
        """(n, T, H*D) -> (n, H, T, D), contiguous."""
        return x.unflatten(-1, (self.heads, self.dim)).transpose(1, 2).contiguous()

    def _grow(self, room: int) -> None:
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_empty(*old.shape[:2], room, self.dim)
                new[:, :, : old.size(2)] = old
                setattr(layer, name, new)
        first = self.layers[0].block.layer[0].SelfAttention
        bias = first.compute_bias(room, room).to(self.layers[0].keys.dtype)
        self.bias = (
            bias.contiguous()
        )  # (1, H, room, room); as the library strides it, fused attention does not take it

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (n,) of the present ones alone."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        slots = rows if self.slots is None else self.slots[rows]
        questions, place = (slots // self.k).unique(return_inverse=True)
        if len(questions) < self.questions:  # no row of some question is left
            for layer in self.layers:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[questions], layer.prompt_values[questions]
            self.mask, self.questions = self.mask[questions], len(questions)
        self.slots = place * self.k + slots % self.k

    def step(self, tokens: Tensor) -> Tensor:
        """The next position's tokens (n,) -> logits (n, V) of the one after it."""
        t, room = self.length, self.layers[0].keys.size(2)
        if t == room:
            self._grow(2 * room)
        bias = self.bias[:, :, t : t + 1, : t + 1]
        x = self.policy.shared(tokens)  # (n, d)
        for layer in self.layers:
            own, cross, feed_forward = layer.block.layer
            x = x + self._look_back(own.SelfAttention, own.layer_norm(x), layer, bias)
            x = x + self._look_at_prompt(cross.EncDecAttention, cross.layer_norm(x), layer)
            x = feed_forward(x)
        self.length += 1
        x = self.policy.decoder.final_layer_norm(x)
        return self.policy.lm_head(x * self.policy.config.head_scale)

    def _look_back(self, attention: Any, x: Tensor, layer: _Layer, bias: Tensor) -> Tensor:
        t = self.length
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, 1, self.dim)) for linear in (attention.q, attention.k, attention.v)
        )  # (n, H, 1, D)
        layer.keys[:, :, t : t + 1], layer.values[:, :, t : t + 1] = key, value
        keys, values = layer.keys[:, :, : t + 1], layer.values[:, :, : t + 1]
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)  # (n, H, 1, D)
        return attention.o(seen.flatten(1))

    def _look_at_prompt(self, attention: Any, x: Tensor, layer: _Layer) -> Tensor:
        query = attention.q(x)  # (n, H*D)
        if self.slots is not None:
            query = query.new_zeros(self.questions * self.k, query.size(1)).index_copy(0, self.slots, query)
        query = query.view(self.questions, self.k, self.heads, self.dim).transpose(1, 2)  # (Q, H, k, D)
        seen = F.scaled_dot_product_attention(
            query, layer.prompt_keys, layer.prompt_values, attn_mask=self.mask, scale=1.0
        )
        seen = seen.transpose(1, 2).flatten(2).flatten(0, 1)  # (Q*k, H*D)
        return attention.o(seen if self.slots is None else seen[self.slots])
