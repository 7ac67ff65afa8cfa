"""Generation from an encoder-decoder T5: one loop, for greedy decoding and for sampling.

    ids = greedy(model, collator(items), max_length=128)       # (B, <= 128), start token first, pads after `</s>`
    ids, logprobs = generate(policy, states, mask, k, max_length, choose)      # rl/sampling.py

Each prompt is encoded once, keys and values of the prompt are stored once per prompt (not per row), and finished rows
are removed from the batch, so one long text does not delay the others.

On a GPU launching a step's 350 kernels takes longer than running them, so a step is captured as a CUDA graph, which is
launched as a whole (--decode_graph). A graph has fixed shapes: attention then reads the whole cache, behind a mask.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares.cli import in_one_line, print0
from ares.devices import on_gpu

FIRST_LENGTH = 64  # initial capacity of the key-value cache in positions; doubled when full
ALIGNMENT = 8  # positions: of the strides of a mask that fused attention takes as it is
KEEP_SHARE = 0.875  # finished rows are removed once they are more than an eighth: each removal copies keys and values
KEEP_SHARE_OF_GRAPH = 0.5  # as KEEP_SHARE for a step of fixed shapes: each removal captures another graph, too
CHECK_STEPS = 8  # on a GPU: steps between two checks for finished rows, because a check waits for the GPU


graph_mode = "auto"  # of --decode_graph; auto: on a GPU. `on` without a GPU decodes in fixed shapes without a graph


def use_graphs(mode: str) -> None:
    """Set --decode_graph for this process. It changes no token but where two are equally likely within rounding."""
    global graph_mode
    graph_mode = mode


def action_mask(actions: Tensor) -> Tensor:
    """(B, L) decoder ids -> (B, L - 1) bool: the positions whose choice is a real token, `</s>` included."""
    return actions[:, 1:] != 0  # T5's pad


@torch.no_grad()
def greedy(model: Any, inputs: Mapping[str, Tensor], max_length: int) -> Tensor:
    """Ids (B, L), L at most `max_length`, as `model.generate(do_sample=False)`: start token in column 0, pads after
    `</s>`; on the inputs' device.

    `inputs`: `input_ids`, `attention_mask` and, for a model with image layers, `image_ids`. `model` may be wrapped in
    a LoRA adapter.
    """
    policy = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = policy.encode(**inputs).last_hidden_state
    return generate(policy, states, inputs["attention_mask"], 1, max_length, arg_max)[0]


def arg_max(logits: Tensor, rows: Tensor, t: int) -> Tensor:
    """The likeliest token of each row of logits (n, V)."""
    return logits.argmax(-1)


def generate(
    policy: nn.Module, states: Tensor, attention_mask: Tensor, k: int, max_length: int,
    choose: Callable[[Tensor, Tensor, int], Tensor], with_logprobs: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Write k texts for each of Q encoded prompts: ids (Q*k, L), L at most `max_length`, start token in column 0.

    states (Q, S, d) and attention_mask (Q, S) are of the prompts; `choose(logits (n, V), rows (n,), t)` returns the
    tokens (n,) of position t for the unfinished rows and may change the logits. With `with_logprobs` also the
    log-probabilities of the tokens under the full soft-max, (Q*k, L - 1) float32. Results are on the states' device.
    """
    config, device, n = policy.config, states.device, len(states) * k
    ids = torch.full((n, max_length), config.pad_token_id, dtype=torch.long, device=device)
    ids[:, 0] = config.decoder_start_token_id
    logprobs = torch.zeros(n, max_length - 1, device=device) if with_logprobs else None
    static = graph_mode == "on" or graph_mode == "auto" and device.type == "cuda"
    decoder = StepDecoder(policy, states, attention_mask, k, static)
    rows = torch.arange(n, device=device)  # of the texts that are still in the batch
    tokens, ended = ids[:, 0], torch.zeros(n, dtype=torch.bool, device=device)
    check_steps = CHECK_STEPS if on_gpu(device) else 1
    for t in range(1, max_length):
        logits = decoder.step(tokens)  # (n, V)
        log_z = logits.float().logsumexp(-1) if with_logprobs else None
        tokens = choose(logits, rows, t).masked_fill(ended, config.pad_token_id)
        ids[rows, t] = tokens
        if with_logprobs:
            logprobs[rows, t - 1] = logits.gather(1, tokens[:, None])[:, 0].float() - log_z
        ended |= tokens == config.eos_token_id
        if t % check_steps:
            continue
        left = (~ended).nonzero()[:, 0]
        if len(left) == 0:
            return ids[:, : t + 1], None if logprobs is None else logprobs[:, :t]
        if len(left) <= (KEEP_SHARE_OF_GRAPH if decoder.static else KEEP_SHARE) * len(rows):
            decoder.keep(left)
            rows, tokens, ended = rows[left], tokens[left], ended[left]
    return ids, logprobs


@functools.cache
def _first_graph(device: torch.device) -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
    """A graph that is never freed, and with it the memory pool of all graphs; and the stream of all captures.

    With a pool and a stream for each capture memory would grow: a pool's memory is used again on its own stream only,
    that of freed graphs is no use to a later capture, and cuBLAS keeps a workspace for each stream.
    """
    graph, stream, x = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.zeros(1, device=device)
    with _capturing(graph, stream, torch.cuda.graph_pool_handle()):
        x.zero_()
    return graph, stream


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int]) -> Iterator[None]:
    """Capture the block as `graph`. Raises RuntimeError, with the allocator as it was before, if that fails."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        try:
            graph.capture_begin(pool, capture_error_mode="thread_local")  # another thread may be pinning memory
            try:
                yield
            finally:
                graph.capture_end()
        except BaseException:
            graph.reset()
            # older torch does not do so after an invalid capture, and then never frees its cache when memory lacks
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise


@dataclass
class _Layer:
    """A decoder block and its cache: keys and values of the rows (n, H, capacity, D), of the prompts (Q, H, S, D)."""

    block: nn.Module
    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class StepDecoder:
    """T5's decoder, one position at a time, for k rows of each of Q prompts, in eval mode and without gradients.

    Runs the library's own layers; only the cache is ours: rows have spare capacity, so a step copies nothing, and the
    k rows of a prompt share its keys and values.

    `static`: nothing in a step depends on the position but a tensor, so the step can be a CUDA graph. It is captured
    at the second step of each shape: at first, after the capacity was doubled, after rows were removed. Each call
    captures its own, because under autocast a graph reads the weights' copies in half precision, which live as long as
    the caller's context.
    """

    def __init__(self, policy: nn.Module, states: Tensor, attention_mask: Tensor, k: int, static: bool = False):
        self.policy, self.static, self.length = policy, static, 0
        self.captures = static and states.is_cuda
        self.heads, self.dim = policy.config.num_heads, policy.config.d_kv
        self.slots = None  # (n,) indices of the rows in (Q, k); None: all of them, in order
        self.k, self.questions = k, len(states)
        if on_gpu(states.device):  # fused attention copies a mask with other strides in every call
            extra = -states.size(1) % ALIGNMENT
            states, attention_mask = F.pad(states, (0, 0, 0, extra)), F.pad(attention_mask, (0, extra))
        self.layers = []
        for block in policy.decoder.block:
            attention = block.layer[1].EncDecAttention
            projected = [linear(states).unflatten(-1, (self.heads, self.dim)) for linear in (attention.k, attention.v)]
            keys, values = (x.transpose(1, 2).contiguous() for x in projected)  # (Q, H, S, D)
            none = keys.new_empty(len(states) * k, self.heads, 0, self.dim)
            self.layers.append(_Layer(block, keys, values, none, none))
        # attention would make numbers of a boolean mask in every layer of every step
        zero = keys.new_zeros(attention_mask[:, None, None].shape)
        self.mask = zero.masked_fill_(~attention_mask[:, None, None].bool(), -torch.inf)  # (Q, 1, 1, S)
        self.position = torch.zeros(1, dtype=torch.long, device=states.device)  # `length`, for a static step
        self._grow(FIRST_LENGTH)

    def _grow(self, capacity: int) -> None:
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(*old.shape[:2], capacity, self.dim)  # a static step multiplies all of it, by 0
                new[:, :, : old.size(2)] = old
                setattr(layer, name, new)
        first = self.layers[0].block.layer[0].SelfAttention
        bias = first.compute_bias(capacity, capacity).to(self.layers[0].keys.dtype)
        future = torch.ones(capacity, capacity, dtype=torch.bool, device=bias.device).triu_(1)
        # (1, H, capacity, capacity); fused attention does not accept the library's strides
        self.bias = bias.masked_fill(future, -torch.inf).contiguous()
        self.graph, self.warm = None, False

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows (n,) of the present ones only."""
        self.graph, self.warm = None, False
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        slots = rows if self.slots is None else self.slots[rows]
        questions, index = (slots // self.k).unique(return_inverse=True)
        if len(questions) < self.questions:  # some prompts have no row left
            for layer in self.layers:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[questions], layer.prompt_values[questions]
            self.mask, self.questions = self.mask[questions], len(questions)
        slots = index * self.k + slots % self.k
        self.slots = slots if len(slots) < self.questions * self.k else None

    def step(self, tokens: Tensor) -> Tensor:
        """The next position's tokens (n,) -> logits (n, V) of the one after it, overwritten by the next step."""
        if self.length == self.layers[0].keys.size(2):
            self._grow(2 * self.length)
        self.position.fill_(self.length)
        # the first step of these shapes runs as it is: what is done once, such as casting weights or loading cuBLAS's
        # kernels, must not be in a graph
        if self.captures and self.graph is None and self.warm:
            self._capture(tokens)
        if self.graph is None:
            logits, self.warm = self._logits(tokens), True
        else:
            self.tokens.copy_(tokens)
            self.graph.replay()
            logits = self.logits
        self.length += 1
        return logits

    def _capture(self, tokens: Tensor) -> None:
        """Capture a step as `graph`, from `tokens` to `logits`; if that fails, say so and go on without."""
        self.tokens = tokens.clone()
        for first in (True, False):
            try:
                graph = torch.cuda.CUDAGraph()
                kept, stream = _first_graph(tokens.device)
                with _capturing(graph, stream, kept.pool()):
                    self.logits = self._logits(self.tokens)
                self.graph = graph
                return
            except RuntimeError as error:
                why, full = in_one_line(error, 160), isinstance(error, torch.OutOfMemoryError)
            if not (first and full):
                break
            torch.cuda.empty_cache()  # no allocation within a capture does that; here no exception holds tensors
        print0(f"note: decoding goes on without CUDA graphs, as with --decode_graph off ({why})")
        use_graphs("off")
        self.static = self.captures = False

    def _logits(self, tokens: Tensor) -> Tensor:
        t = self.length
        bias = self.bias.index_select(2, self.position) if self.static else self.bias[:, :, t : t + 1, : t + 1]
        x = self.policy.decoder.embed_tokens(tokens)  # (n, d)
        for layer in self.layers:
            own, cross, feed_forward = layer.block.layer
            x = x + self._self_attention(own.SelfAttention, own.layer_norm(x), layer, bias)
            x = x + self._cross_attention(cross.EncDecAttention, cross.layer_norm(x), layer)
            x = feed_forward(x)
        x = self.policy.decoder.final_layer_norm(x)
        return self.policy.lm_head(x * self.policy.config.head_scale)

    def _self_attention(self, attention: Any, x: Tensor, layer: _Layer, bias: Tensor) -> Tensor:
        x = x.to(layer.keys.dtype)  # under autocast once, not for each of three products
        linears, shape = (attention.q, attention.k, attention.v), (self.heads, 1, self.dim)
        query, key, value = (linear(x).unflatten(-1, shape) for linear in linears)  # (n, H, 1, D)
        keys, values, t = layer.keys, layer.values, self.length
        if self.static:
            keys.index_copy_(2, self.position, key), values.index_copy_(2, self.position, value)
        else:
            keys[:, :, t : t + 1], values[:, :, t : t + 1] = key, value
            keys, values = keys[:, :, : t + 1], values[:, :, : t + 1]
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)  # (n, H, 1, D)
        return attention.o(out.flatten(1))

    def _cross_attention(self, attention: Any, x: Tensor, layer: _Layer) -> Tensor:
        query = attention.q(x)  # (n, H*D)
        if self.slots is not None:
            query = query.new_zeros(self.questions * self.k, query.size(1)).index_copy(0, self.slots, query)
        query = query.view(self.questions, self.k, self.heads, self.dim).transpose(1, 2)  # (Q, H, k, D)
        keys, values = layer.prompt_keys, layer.prompt_values  # (Q, H, S, D)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask, scale=1.0)  # (Q, H, k, D)
        out = out.transpose(1, 2).flatten(2).flatten(0, 1)  # (Q*k, H*D)
        return attention.o(out if self.slots is None else out[self.slots])
