"""Sampling: k rationales for each prompt of a batch, with log-probabilities, reference log-probabilities and values.

Every model encodes each prompt once, whatever k (ares/decoding.py has the loop). A rationale depends on its seed, its
row and its prompt only: row i draws position t with the uniform number u[i, t], so nothing changes when other rows
leave the batch.

Sampling truncates the distribution to top-k / top-p, while log-probabilities come from the full soft-max, as in the
released code. The pad token is never drawn, because it means "no token" in every mask.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares import decoding
from ares.decoding import action_mask
from ares.devices import flat_index, on_gpu, padded_length, pinned, to_device
from rl import actor_critic
from rl.minibatches import GPU_GROUP_COST, length_groups

PAD = 0
SCORING_TOKENS = 16384  # decoder positions per forward pass of `evaluate_actions`
BLOCK = 128  # logits per block of `top`


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
    """The models that sampling needs, in eval mode. Without a value function (RLOO) every value is 0. Where the policy
    is the reference, too, each rationale is scored once.

    `offload`: reference and value function are and stay on the CPU; the one in use has a copy on the policy's device,
    which is dropped afterwards.
    """

    policy: nn.Module
    reference: nn.Module
    value_function: nn.Module | None
    offload: bool = False

    def __post_init__(self):
        self.device = next(self.policy.parameters()).device
        for model in (self.reference, self.value_function) if self.offload else ():
            for tensor in _weights(model) if model not in (None, self.policy) else ():
                tensor.data = pinned(tensor.data, self.device)

    @contextlib.contextmanager
    def on_device(self, model):
        """`model` on the policy's device for the length of a `with` block."""
        kept = [(tensor, tensor.data) for tensor in _weights(model)] if self.offload else []
        for tensor, data in kept:
            tensor.data = to_device(data, self.device)
        yield model
        for tensor, data in kept:
            tensor.data = data


def _weights(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def sample_batch(models: Models, prompt: dict[str, Tensor], sampling: Sampling, seed: int) -> dict[str, Tensor]:
    """Draw k rationales for each of B prompts and evaluate them.

    Returns actions (B*k, L) int64, rows of one question side by side, and logprobs, ref_logprobs, values
    (B*k, L-1) float32 with zeros outside the mask, all on the CPU.
    """
    states = actor_critic.encode(models.policy, prompt)  # (B, S, d)
    actions, logprobs = generate(models.policy, states, prompt["attention_mask"], sampling, seed)
    if torch.is_autocast_enabled(states.device.type):
        # in half precision a step and a whole pass round differently: training compares with a whole pass
        logprobs = evaluate_actions(models.policy, prompt, actions, sampling.k, states=states)
    out = {"actions": actions, "logprobs": logprobs, "ref_logprobs": logprobs}
    if models.reference is not models.policy:
        with models.on_device(models.reference) as reference:
            out["ref_logprobs"] = evaluate_actions(reference, prompt, actions, sampling.k)
    if models.value_function is None:
        out["values"] = torch.zeros_like(out["logprobs"])
    else:
        with models.on_device(models.value_function) as value_function:
            out["values"] = evaluate_actions(value_function, prompt, actions, sampling.k, value=True)
    return out


def evaluate_actions(
    model: nn.Module, prompt: dict[str, Tensor], actions: Tensor, k: int, value: bool = False, states=None
) -> Tensor:
    """Log-probabilities of `actions` (B*k, L) by a policy, or values: (B*k, L-1) float32 on the CPU, 0 in padding.

    Rows of similar length share a forward pass.
    """
    device = prompt["input_ids"].device
    states = actor_critic.encode(model, prompt) if states is None else states
    mask = action_mask(actions)  # on the CPU, as everything that decides about shapes
    lengths = mask.sum(1)
    out, found = torch.zeros(mask.shape), []
    group_cost = GPU_GROUP_COST if on_gpu(device) else None
    for group in length_groups(lengths.tolist(), SCORING_TOKENS, group_cost):
        rows, T = torch.tensor(group), padded_length(int(lengths[group[0]]), device)
        chunk = F.pad(actions[rows, : T + 1], (0, max(0, T + 1 - actions.size(1))), value=PAD)
        real = action_mask(chunk)
        how = (model, states, prompt["attention_mask"], to_device(rows // k, device), to_device(chunk, device))
        if value:
            numbers = actor_critic.state_values(*how)
        else:
            index = flat_index(real, device)
            numbers, _ = actor_critic.policy_logprobs(*how, index, with_entropy=False)
        found.append((rows, real, numbers))
    for rows, real, numbers in found:  # after the loop: fetching waits for a GPU
        T = min(real.size(1), out.size(1))
        out[rows, :T] = numbers.float().cpu().masked_fill(~real, 0)[:, :T]
    return out


def generate(
    policy: nn.Module, states: Tensor, attention_mask: Tensor, sampling: Sampling, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw k rationales for each of Q encoded prompts: actions (Q*k, L) int64, L at most `output_len`, and their
    log-probabilities under the full soft-max (Q*k, L-1) float32, 0 in padding; both on the CPU."""
    u = to_device(uniform_noise(len(states) * sampling.k, sampling.output_len, seed), states.device)

    def choose(logits: Tensor, rows: Tensor, t: int) -> Tensor:
        return draw(logits, sampling, u[rows, t])

    actions, logprobs = decoding.generate(
        policy, states, attention_mask, sampling.k, sampling.output_len, choose, with_logprobs=True
    )
    actions = actions.cpu()
    mask = action_mask(actions)
    T = int(mask.sum(1).max())
    return actions[:, : T + 1], logprobs.cpu()[:, :T].masked_fill(~mask[:, :T], 0)


def uniform_noise(rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) uniform in [0, 1), one number per position; the same on every device."""
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, sampling: Sampling, u: Tensor) -> Tensor:
    """One token for each row of logits (n, V), from u (n,) in [0, 1): the first whose cumulative probability, most
    likely first, exceeds u. Never the pad; overwrites its logits."""
    logits[:, PAD] = -torch.inf
    if not sampling.do_sample:
        return logits.argmax(-1)
    ids, probabilities = candidates(logits, sampling)
    cumulative = probabilities.double().cumsum(-1)
    index = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)  # in fp64 u < 1 never reaches the end
    return index if ids is None else ids.gather(1, index[:, None])[:, 0]


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """What may be drawn, (n, m) token ids (None: all, by id) and their probabilities, not normalised: the `top_k`
    most likely (0: all), and of these the fewest whose share of the mass reaches `top_p`."""
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
    """`logits.topk(k)`, several times faster on a CPU: the k largest are in the k blocks with the largest maxima."""
    n, V = logits.shape
    if logits.device.type != "cpu" or V < 8 * BLOCK or k * BLOCK > V // 2:
        return logits.topk(k)
    logits = F.pad(logits, (0, -V % BLOCK), value=-torch.inf) if V % BLOCK else logits
    blocks = logits.view(n, -1, BLOCK)
    _, best = blocks.amax(-1).topk(k)  # (n, k)
    values, index = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(k)
    return values, best.gather(1, index // BLOCK) * BLOCK + index % BLOCK
