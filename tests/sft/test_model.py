"""model.py against the released code's checkpoints and numbers, and what the library would otherwise get wrong."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from ares import devices, head
from ares.checkpoints import portable_tokenizer
from ares.cli import UserError
from ares.decoding import action_mask
from model import (
    EMBEDDINGS,
    VALUE_FUNCTION,
    MultimodalT5Config,
    T5ForMultimodalGeneration,
    T5ForMultimodalGenerationValueFunction,
    check_checkpoint,
    choose_attention,
    save_value_function,
    types_that_fit,
)
from rl import actor_critic
from tests.tiny import make_model, write

KINDS = ("vit", "vit_tied")
BOTH = (T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction)
SMALL = dict(vocab_size=120, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)


class Released:
    """One checkpoint folder of the fixtures with its inputs and expected outputs."""

    def __init__(self, folder):
        self.folder = folder
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text())
        self.prompt = {name: self.inputs[name] for name in ("input_ids", "attention_mask", "image_ids")}

    @staticmethod
    def decoder(actions):
        """The fixtures' decoder mask: id != 0, column 0 set to 1."""
        mask = (actions != 0).long()
        mask[:, 0] = 1
        return {"decoder_input_ids": actions, "decoder_attention_mask": mask}


@pytest.fixture(scope="module", params=KINDS)
def released(request, fixtures):
    return Released(fixtures / "model" / request.param)


@pytest.fixture(scope="module")
def vit(fixtures):
    made = Released(fixtures / "model" / "vit")
    made.value = T5ForMultimodalGenerationValueFunction.from_pretrained(made.folder).eval()
    return made


@pytest.fixture(scope="module")
def policy(released):
    return T5ForMultimodalGeneration.from_pretrained(released.folder).eval()


def small(tied=False, patch_size=(6, 10), cls=T5ForMultimodalGeneration, **changes):
    torch.manual_seed(0)
    config = MultimodalT5Config(**{**SMALL, **changes}, tie_word_embeddings=tied, patch_size=patch_size)
    return cls(config).eval()


def batch(rows=3, source=9, target=6, patches=(6, 10), seed=1):
    """Ragged, right-padded random inputs."""
    g = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(2, 120, (rows, width), generator=g) for width in (source, target))
    mask, wanted = torch.ones_like(ids), torch.ones_like(labels)
    for row in range(1, rows):
        mask[row, source - 2 * row :] = 0
        wanted[row, target - row :] = 0
    out = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels.masked_fill(wanted == 0, -100)}
    if patches:
        out["image_ids"] = torch.randn(rows, *patches, generator=g)
        out["image_ids"][-1] = 0  # no image
    return out


def prompt(**changes):
    """The part of a batch that `generate` takes."""
    return {name: tensor for name, tensor in batch(**changes).items() if name != "labels"}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_tied(model, tied):
    weights = dict(model.named_parameters(remove_duplicate=False))
    assert all(weights[name] is weights["shared.weight"] for name in EMBEDDINGS)
    assert (weights["lm_head.weight"] is weights["shared.weight"]) == tied
    state = model.state_dict()
    assert all(state[name].data_ptr() == state["shared.weight"].data_ptr() for name in EMBEDDINGS)
    assert (state["lm_head.weight"].data_ptr() == state["shared.weight"].data_ptr()) == tied


# -- the released code's numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_and_greedy(released, attention):
    model = T5ForMultimodalGeneration.from_pretrained(released.folder, attn_implementation=attention).eval()
    assert model.decoder.config._attn_implementation == attention
    labels, expected = released.inputs["labels"], released.expected
    with torch.no_grad():
        out = model(**released.prompt, labels=labels)
        ignoring_pads = model(**released.prompt, labels=labels.masked_fill(labels == 0, -100))
        greedy = model.generate(**released.prompt, **released.meta["generate_kwargs"])
    assert_near(out.encoder_last_hidden_state, expected["encoder_last_hidden_state"], 1e-4)
    assert_near(out.logits[..., ::64], expected["logits_every64"], 2e-3)
    assert_near(out.logits.logsumexp(-1), expected["logits_logsumexp"], 2e-3)
    assert torch.equal(out.logits.argmax(-1), expected["logits_argmax"])
    assert_near(out.loss, expected["loss"][0], 1e-4)
    assert_near(ignoring_pads.loss, expected["loss_ignore_pad"][0], 1e-4)
    assert torch.equal(greedy, expected["greedy_ids"])


def assert_near(got, expected, atol):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("source", ["greedy_ids", "actions2"])
def test_logprobs_and_values_of_given_actions(released, policy, vit, source):
    """Log probabilities as PPO computes them: the encoder once, the decoder on its states, logit minus logsumexp."""
    actions = released.expected[source]
    mask = action_mask(actions)
    with torch.no_grad():
        states = actor_critic.encode(policy, released.prompt)
        logprobs, _ = actor_critic.policy_logprobs(
            policy, states, released.prompt["attention_mask"], None, actions, devices.flat_index(mask)
        )
    expected = released.expected[f"{source.removesuffix('_ids')}_logprobs"]
    assert_near(logprobs[mask], expected[mask], 2e-3)

    actions, model = vit.expected[source], vit.value
    expected = vit.expected["values" if source == "greedy_ids" else "actions2_values"]
    with torch.no_grad():
        values = model(**vit.prompt, **vit.decoder(actions))
        states = model.encode(**vit.prompt)
        again = model(encoder_outputs=states, attention_mask=vit.prompt["attention_mask"], **vit.decoder(actions))
        labels_only = model(**vit.prompt, labels=torch.cat([actions[:, 1:], actions[:, :1]], 1))
    real = vit.decoder(actions)["decoder_attention_mask"].bool()
    assert values.shape == actions.shape
    assert_near(values[real], expected[real], 1e-3)
    assert_near(again, values, 1e-6)
    assert_near(labels_only[real], values[real], 1e-5)  # causal: the pads' mask changes nothing before them


def test_names_shapes_and_gradients(released, policy, vit):
    meta, model = released.meta, policy
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == meta["state_dict"]
    assert [name for name, _ in model.named_parameters()] == meta["named_parameters"]
    assert sum(p.numel() for p in model.parameters()) == meta["num_parameters"]
    model(**released.prompt, labels=released.inputs["labels"]).loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    model.zero_grad()
    assert norms == pytest.approx(meta["grad_norms_of_loss"], rel=1e-3)
    value = vit.value
    assert {name: list(tensor.shape) for name, tensor in value.state_dict().items()} == vit.meta["value_state_dict"]
    assert [name for name, p in value.named_parameters() if p.requires_grad] == vit.meta["value_trainable"]
    assert [name for name, p in value.named_parameters() if not p.requires_grad] == vit.meta["value_frozen"]


@pytest.mark.parametrize("cut", ["dynamic", "wider", "alone"])
def test_padding_changes_nothing_at_real_positions(released, policy, cut):
    lengths = released.prompt["attention_mask"].sum(1)
    rows = lengths < 512  # one of the four fills all 512 columns
    assert 2 <= rows.sum() < 4
    if cut == "alone":
        rows &= torch.arange(4) == int(rows.nonzero()[0])
    prompt = {name: tensor[rows] for name, tensor in released.prompt.items()}
    longest = int(lengths[rows].max())
    for name in ("input_ids", "attention_mask"):
        cropped = prompt[name][:, :longest]
        prompt[name] = torch.nn.functional.pad(prompt[name], (0, 40)) if cut == "wider" else cropped
    with torch.no_grad():
        out = policy(**prompt, labels=released.inputs["labels"][rows])
        greedy = policy.generate(**prompt, **released.meta["generate_kwargs"])
    real = prompt["attention_mask"][:, :longest].bool()
    states = released.expected["encoder_last_hidden_state"][rows]
    assert_near(out.encoder_last_hidden_state[:, :longest][real], states[:, :longest][real], 1e-4)
    assert_near(out.logits[..., ::64], released.expected["logits_every64"][rows], 2e-3)
    assert torch.equal(greedy, released.expected["greedy_ids"][rows, : greedy.size(1)])
    assert not released.expected["greedy_ids"][rows, greedy.size(1) :].any()


# -- tying, saving, loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BOTH)
def test_tying_after_load_save_and_reload(released, cls, tmp_path):
    tied = released.meta["tied"]
    model = cls.from_pretrained(released.folder, patch_size=(145, 1024))
    assert_tied(model, tied)
    model.save_pretrained(tmp_path)
    assert_tied(model, tied)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied  # what transformers 4 and the released code go by
    assert config["image_patch_size"] == [145, 1024]
    again = cls.from_pretrained(tmp_path)
    assert_tied(again, tied)
    assert again.config.patch_size == (145, 1024)
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cls", BOTH)
def test_tying_after_build(cls, tied):
    model = small(tied, cls=cls)
    assert_tied(model, tied)
    assert_tied(copy.deepcopy(model), tied)
    assert model.config.scale_decoder_outputs is tied
    model.tie_weights()  # accelerate and peft call it
    assert_tied(model, tied)
    # `T5Config(tie_word_embeddings=False)` reads True afterwards, the library's trap: the model must still be untied
    config = T5Config(**SMALL, **({} if tied else {"tie_word_embeddings": False}))
    assert config.tie_word_embeddings is True
    assert_tied(cls(config, patch_size=(6, 10)), tied)


@pytest.mark.parametrize("untie", [False, True])
def test_folders_of_the_plain_library_class(tmp_path, untie):
    """transformers 5 ties a T5 that says untied; what it saved is loaded as it is: no lm_head in the file, tied."""
    torch.manual_seed(0)
    plain = T5ForConditionalGeneration(T5Config(**SMALL, tie_word_embeddings=False)).eval()
    if untie:  # as flan-T5, loaded and saved by transformers 5
        plain.lm_head.weight = torch.nn.Parameter(torch.randn_like(plain.lm_head.weight))
    plain.save_pretrained(tmp_path)
    expected = logits(plain, **batch(patches=None))
    for folder in (tmp_path, tmp_path / "again"):
        model = T5ForMultimodalGeneration.from_pretrained(folder).eval()
        assert_tied(model, tied=not untie)
        assert_near(logits(model, **batch(patches=None)), expected, 1e-5)
        model.save_pretrained(tmp_path / "again")


def test_value_function_file_and_its_absence(vit, tmp_path):
    value, folder = vit.value, tmp_path / "policy"
    shutil.copytree(vit.folder, folder, ignore=shutil.ignore_patterns(VALUE_FUNCTION))
    policy = T5ForMultimodalGeneration.from_pretrained(folder)
    before = torch.random.get_rng_state()
    load = T5ForMultimodalGenerationValueFunction.from_pretrained
    fresh, same, other = (load(folder, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)  # the run's random state stays
    shared = {name: tensor for name, tensor in fresh.state_dict().items() if not name.startswith("v_head")}
    assert all(torch.equal(tensor, policy.state_dict()[name]) for name, tensor in shared.items())
    assert not torch.equal(value.shared.weight, fresh.shared.weight)  # the fixture's value model has its own weights
    assert torch.equal(fresh.v_head[0].weight, same.v_head[0].weight)
    assert not torch.equal(fresh.v_head[0].weight, other.v_head[0].weight)

    halved = {name: tensor / 2 for name, tensor in value.state_dict().items()}  # gathered from shards, say
    loaded = torch.load(save_value_function(value, folder, halved), weights_only=True)
    assert torch.equal(loaded["shared.weight"], value.shared.weight / 2)
    save_value_function(value, folder)
    assert not list(folder.glob(".tmp*"))
    again = load(folder)
    assert_tied(again, tied=False)
    assert not again.lm_head.weight.requires_grad
    for name, tensor in value.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_weights_are_float32_unless_asked_and_the_config_may_be_given_or_changed(vit, tmp_path):
    load = T5ForMultimodalGeneration.from_pretrained
    model = load(vit.folder, dtype=torch.bfloat16)
    assert model.encoder.image_dense.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = load(tmp_path)  # transformers 5 would take the file's bfloat16
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert logits(model, **vit.prompt, labels=vit.inputs["labels"]).isfinite().all()
    model = load(vit.folder, dropout_rate=0.0)
    assert model.config.dropout_rate == 0.0 and model.encoder.dropout.p == 0.0
    model = load(vit.folder, config=T5Config.from_pretrained(vit.folder))
    assert_tied(model, tied=False)
    assert model.config.patch_size == (None, 1024)


# -- initialisation --------------------------------------------------------------------------------------


def expected_stds(d=64, patch_dim=40):
    """nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), weight and bias."""
    fan_in = {"encoder.image_dense": patch_dim, "encoder.gate_dense": 2 * d, "v_head.0": d}
    stds = {f"{name}.{part}": n**-0.5 / 3**0.5 for name, n in fan_in.items() for part in ("weight", "bias")}
    return stds | {
        "encoder.mha_layer.in_proj_weight": (2 / (d + 3 * d)) ** 0.5,  # Xavier over the packed (3d, d)
        "encoder.mha_layer.out_proj.weight": d**-0.5 / 3**0.5,
        "encoder.mha_layer.in_proj_bias": 0.0,
        "encoder.mha_layer.out_proj.bias": 0.0,
        "v_head.2.weight": (2 * d) ** -0.5 / 3**0.5,
    }


@pytest.mark.parametrize("how", ["build", "load"])
def test_missing_layers_get_pytorch_initialisation(tmp_path, how):
    """Not transformers' fallback N(0, 1), also where the library creates the layers on the meta device."""
    changes = {"d_model": 64, "patch_size": (6, 40)}
    if how == "build":
        model = small(cls=T5ForMultimodalGenerationValueFunction, **changes)
    else:
        torch.manual_seed(0)
        T5ForConditionalGeneration(T5Config(**{**SMALL, "d_model": 64})).save_pretrained(tmp_path)
        model = T5ForMultimodalGenerationValueFunction.from_pretrained(tmp_path, patch_size=(6, 40), seed=1)
    weights = dict(model.named_parameters())
    for name, std in expected_stds().items():
        few = weights[name].numel() < 200
        assert weights[name].std().item() == pytest.approx(std, rel=0.25 if few else 0.06), name


def test_a_model_from_scratch_starts_as_the_library_starts_a_t5():
    """Subclasses count as "custom code", for which transformers 5 leaves every projection of T5 at N(0, 1)."""
    torch.manual_seed(0)
    plain = dict(T5ForConditionalGeneration(T5Config(**SMALL)).named_parameters())
    for name, parameter in small(tied=True).named_parameters():
        if name in plain and parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(plain[name].std().item(), rel=0.15), name


def test_fresh_layers_follow_the_seed(tmp_path):
    small(patch_size=None).save_pretrained(tmp_path)
    load = T5ForMultimodalGeneration.from_pretrained
    one, same, other = (load(tmp_path, patch_size=(6, 10), seed=seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        if ".image_dense." in name:
            assert not torch.equal(tensor, other[name])
        elif not name.startswith(("encoder.mha_layer", "encoder.gate_dense")):
            assert torch.equal(tensor, other[name])


# -- text only -------------------------------------------------------------------------------------------


def test_text_only_is_a_plain_t5(tmp_path):
    small(patch_size=None).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("image_patch_size") is None
    model, value = (cls.from_pretrained(tmp_path).eval() for cls in BOTH)
    assert not any("image_dense" in name for name in model.state_dict())
    inputs = prompt(patches=None)
    ids = model.generate(**inputs, max_length=8)
    with torch.no_grad():
        assert value(**inputs, decoder_input_ids=ids).shape == ids.shape
    with pytest.raises(ValueError, match="no image layers"):
        model(**batch())


def test_images_are_not_forgotten():
    inputs, model = batch(), small()
    with pytest.raises(ValueError, match="pass image_ids"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"])
    full = logits(model, **inputs)
    other, shuffled = (logits(model, **{**inputs, "image_ids": inputs["image_ids"].flip(axis)}) for axis in (0, 1))
    assert not torch.allclose(full[0], other[0], atol=1e-3)
    assert_near(shuffled, full, 1e-5)  # the patches are a set


@pytest.mark.parametrize(
    ("supported", "device", "chosen"), [(True, "cuda", "sdpa"), (False, "cuda", "eager"), (True, "cpu", "eager")]
)
def test_attention_is_one_that_this_transformers_has(supported, device, chosen, monkeypatch):
    model = small()
    monkeypatch.setattr(type(model), "_supports_sdpa", supported)  # transformers 5.0 has none for T5
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        choose_attention(model, torch.device(device))
        assert torch.backends.cuda.cudnn_sdp_enabled() == (device == "cpu")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert model.config._attn_implementation == model.decoder.config._attn_implementation == chosen


# -- generation ------------------------------------------------------------------------------------------


def test_sampling_encodes_each_prompt_once_and_stays_within_top_k(monkeypatch):
    model, inputs = small(), prompt()
    two = model.generate(**inputs, do_sample=True, top_k=2, num_return_sequences=20, max_length=2)
    best = logits(model, **inputs, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))[:, 0].topk(2).indices
    for row in range(3):
        assert set(two[20 * row : 20 * row + 20, 1].tolist()) <= set(best[row].tolist())
    encoded, decoded = [], []
    encoder, decoder = model.encoder.forward, model.decoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda **kw: encoded.append(kw["input_ids"].shape) or encoder(**kw))
    monkeypatch.setattr(model.decoder, "forward", lambda **kw: decoded.append(kw["input_ids"].shape) or decoder(**kw))
    torch.manual_seed(0)
    out = model.generate(**inputs, do_sample=True, top_k=20, top_p=0.9, num_return_sequences=4, max_length=10)
    assert out.shape[0] == 12 and out.shape[1] <= 10 and not out[:, 0].any()
    assert encoded == [(3, 9)]
    assert set(decoded) == {(12, 1)}  # the cache is used: one new token a step
    assert len({tuple(row.tolist()) for row in out[:4]}) > 1


def test_cache_and_masks_do_not_change_greedy():
    model, inputs = small(), prompt()
    cached = model.generate(**inputs, max_length=12)
    assert torch.equal(model.generate(**inputs, max_length=12, use_cache=False), cached)
    inputs.pop("attention_mask")
    assert torch.equal(model.generate(**inputs, max_length=12), cached)  # made from the pads
    assert torch.equal(model.generate(inputs.pop("input_ids"), **inputs, max_length=12), cached)


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("patch_size", [(6, 10), None])
def test_every_trainable_parameter_gets_a_gradient(tied, patch_size):
    """Else DistributedDataParallel stops with unused parameters."""
    inputs = batch(patches=patch_size)
    policy = small(tied, patch_size)
    policy(**inputs).loss.backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None] == []
    value = small(tied, patch_size, cls=T5ForMultimodalGenerationValueFunction)
    value(**inputs).square().mean().backward()
    without = [name for name, p in value.named_parameters() if p.grad is None]
    assert without == ([] if tied else ["lm_head.weight"])
    assert [name for name, p in value.named_parameters() if not p.requires_grad] == without


@pytest.mark.parametrize("cls", BOTH)
def test_gradient_checkpointing_gives_the_same_gradients(cls):
    inputs = batch()
    grads = []
    for checkpointing in (False, True):
        model = small(cls=cls, dropout_rate=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.encoder.block[0].gradient_checkpointing and model.decoder.block[0].gradient_checkpointing
        out = model(**inputs)
        (out.loss if cls is T5ForMultimodalGeneration else out.square().mean()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_of_rl_keeps_no_random_state():
    """A state per block would be fetched from the GPU, which waits for it; there is nothing random without dropout."""
    models = actor_critic.ActorCritic(small(), small(cls=T5ForMultimodalGenerationValueFunction))
    actor_critic.checkpoint_gradients(models)
    blocks = [block for model in models.children() for part in (model.encoder, model.decoder) for block in part.block]
    for block in blocks:
        how = block._gradient_checkpointing_func.keywords
        assert how == {"use_reentrant": False, "preserve_rng_state": False}
    inputs, found = batch(), []
    inputs.pop("labels")
    for checkpointing in (True, False):
        for block in blocks:
            block.gradient_checkpointing = checkpointing
        models.zero_grad()
        logits = models.policy(**inputs, decoder_input_ids=inputs["input_ids"]).logits
        logits.square().mean().backward()
        found.append({name: p.grad for name, p in models.policy.named_parameters()})
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def test_bf16_autocast():
    policy, value, inputs = small(), small(cls=T5ForMultimodalGenerationValueFunction), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = policy(**inputs).loss + value(**inputs).mean()
    loss.backward()
    assert_near(loss, policy(**inputs).loss + value(**inputs).mean(), 0.2)
    assert all(p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize(
    ("tied", "adapter", "rows"),
    [(False, False, 3), (True, False, 3), (False, True, 3), (False, False, 99), (True, False, 99)],
)
def test_training_loss_is_the_sum_over_real_labels_divided_by_those_of_the_step(tied, adapter, rows, monkeypatch):
    """The Trainer's call, which makes logits of `rows` labels at a time, against the plain call, which makes all."""
    monkeypatch.setattr(head, "CACHE", rows * SMALL["vocab_size"])
    model, inputs = small(tied), batch()
    if adapter:  # on the head, too
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q"], init_lora_weights=False)).eval()
    real = inputs["labels"] != -100
    assert not real.all() and not inputs["attention_mask"].all()
    logits = model(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits[real], inputs["labels"][real], reduction="sum") / 37
    outputs = model(**inputs, num_items_in_batch=torch.tensor(37))
    loss = outputs.loss
    assert outputs.logits is None
    assert_near(loss, expected, 1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained))
    # masks and decoder ids that are given are used
    ids = inputs["labels"].clamp(min=2).flip(1)
    for name, value in (("decoder_input_ids", ids), ("decoder_attention_mask", real.flip(1).long())):
        given = {**inputs, "decoder_input_ids": ids, name: value}
        expected = torch.nn.functional.cross_entropy(model(**given).logits[real], inputs["labels"][real])
        assert_near(model(**given, num_items_in_batch=real.sum()).loss, expected, 1e-5)
        assert abs(expected.item() * real.sum().item() / 37 - loss.item()) > 1e-4
    if adapter:
        return
    model.lm_head.weight.requires_grad_(False)  # a frozen head
    model(**inputs, num_items_in_batch=37).loss.backward()
    assert model.lm_head.weight.grad is None and (tied or model.shared.weight.grad.isfinite().all())
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**inputs, num_items_in_batch=37).loss
    assert low.dtype == torch.float32 and float(low.detach()) == pytest.approx(float(loss.detach()), rel=2e-2)


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
def test_values_depend_on_the_masks(name):
    """Without dropout or padding rows the masks are all that hides a token."""
    model, inputs = small(cls=T5ForMultimodalGenerationValueFunction), batch()
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["labels"])
    changed = inputs[name].clone()
    changed[:, 1] = 0
    with torch.no_grad():
        assert not torch.allclose(model(**inputs)[:, 2:], model(**{**inputs, name: changed})[:, 2:], atol=1e-4)


def test_trainer_accumulation_is_exact(tmp_path):
    """Two ragged micro-batches of 2 take the step of one batch of 4 (the loss is divided by the step's targets)."""
    data = batch(rows=4, source=11)
    rows = [{name: tensor[i] for name, tensor in data.items()} for i in range(4)]
    after = []
    for size, steps in ((4, 1), (2, 2)):
        model = small(dropout_rate=0.0)
        args = TrainingArguments(
            output_dir=tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            learning_rate=0.1, optim="sgd", max_grad_norm=0, report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=rows).train()
        after.append({name: p.detach() for name, p in model.named_parameters()})
    torch.testing.assert_close(after[0], after[1], atol=1e-6, rtol=1e-4)
    start = dict(small().named_parameters())
    assert not torch.equal(after[0]["encoder.image_dense.weight"], start["encoder.image_dense.weight"])


# -- checkpoints that do not fit -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    small(patch_size=(145, 1024)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, *words, patch_size=(145, 1024), img_type="vit"):
    with pytest.raises(UserError) as caught:
        check_checkpoint(folder, patch_size, img_type, flag="--base_model_dir")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--base_model_dir: ")
    for word in words:
        assert word in message, message


def test_what_passes(released, folder, tmp_path):
    info = check_checkpoint(released.folder, (145, 1024), "vit")
    assert (info.tied, info.patch_size) == (released.meta["tied"], (None, 1024))
    assert {name: list(shape) for name, shape in info.shapes.items()} == released.meta["state_dict"]
    assert info.has_value_function == ("value_state_dict" in released.meta)
    assert check_checkpoint(folder, (145, 1024), "vit").patch_size == (145, 1024)
    assert check_checkpoint("declare-lab/flan-alpaca-base", (145, 1024), "vit") is None  # a hub id: nothing to read
    small(patch_size=None).save_pretrained(tmp_path / "text")
    assert check_checkpoint(tmp_path / "text", (145, 1024), "vit").patch_size is None  # fresh image layers
    assert check_checkpoint(tmp_path / "text") is not None


def test_features_of_another_kind(released, folder, tmp_path):
    tensor = ["encoder.image_dense.weight", "use --img_type vit"]
    detr = [tensor[0], "1024", "--img_type detr gives 256", "--img_type vit"]
    refused(released.folder, *detr, patch_size=(100, 256), img_type="detr")
    refused(released.folder, *tensor, "no --img_type is given", patch_size=None, img_type=None)
    refused(folder, "145 patches", "--img_type clip gives 49", patch_size=(49, 1024), img_type="clip")
    with pytest.raises(UserError, match="patch_size gives 2048"):
        T5ForMultimodalGeneration.from_pretrained(released.folder, patch_size=(49, 2048))
    small(patch_size=(None, 2048)).save_pretrained(tmp_path)  # types that share a size are both named
    refused(tmp_path, "--img_type resnet or clip")
    assert types_that_fit((512, 2048)) == ["resnet"] and types_that_fit((49, 2048)) == ["clip"]
    assert types_that_fit((7, 2048)) == [] and types_that_fit((None, 1024)) == ["vit"]


def test_folders_without_a_model(tmp_path, folder, monkeypatch):
    refused(tmp_path / "absent" / "deep", "does not exist")
    refused(tmp_path, "no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "LoRA adapter")
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights", "model.safetensors", "pytorch_model.bin")
    for config, words in (("{", ["config.json"]), ('{"model_type": "bert"}', ["'bert'", "T5"])):
        (folder / "config.json").write_text(config)
        refused(folder, *words)
    for name, value in (("d_model", '"wide"'), ("d_ff", 10**8), ("num_layers", 0), ("vocab_size", "true")):
        (folder / "config.json").write_text(f'{{"model_type": "t5", "{name}": {value}}}')
        refused(folder, f"no valid T5 configuration ({name} is")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="neither a folder here nor a model the Hub gives"):
        T5ForMultimodalGeneration.from_pretrained("nobody/no-such-model", cache_dir=tmp_path)


def test_damaged_or_wrong_weights(folder, vit, tmp_path):
    weights, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    name = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    save_file({k: v for k, v in weights.items() if k != name}, path, {"format": "pt"})
    refused(folder, "lacks", name)
    with pytest.raises(UserError, match="EncDecAttention"):
        T5ForMultimodalGeneration.from_pretrained(folder)
    save_file({**weights, name: torch.zeros(5, 32)}, path, {"format": "pt"})
    refused(folder, name, "[5, 32]", "[32, 32]")
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "model.safetensors", "damaged")
    shutil.copytree(vit.folder, tmp_path / "bin")
    path = tmp_path / "bin" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100_000])
    refused(tmp_path / "bin", "pytorch_model.bin", "damaged")


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_embedding_may_have_any_of_its_names(folder, name):
    before = T5ForMultimodalGeneration.from_pretrained(folder).state_dict()
    weights = load_file(folder / "model.safetensors")
    stored = next(each for each in ("shared.weight", *EMBEDDINGS) if each in weights)
    weights[name] = weights.pop(stored)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert check_checkpoint(folder, (145, 1024), "vit") is not None
    model = T5ForMultimodalGeneration.from_pretrained(folder)
    assert_tied(model, tied=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_sharded_and_old_checkpoints(folder, tmp_path):
    model, shard_folder = T5ForMultimodalGeneration.from_pretrained(folder), tmp_path / "shards"
    model.save_pretrained(shard_folder, max_shard_size="40KB")
    shards = sorted(shard_folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert check_checkpoint(shard_folder, (145, 1024), "vit").shapes.keys() <= model.state_dict().keys()
    again = T5ForMultimodalGeneration.from_pretrained(shard_folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    shards[-1].unlink()
    refused(shard_folder, shards[-1].name, "absent")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert check_checkpoint(folder, (145, 1024), "vit").patch_size == (145, 1024)


def test_value_function_of_another_model(folder):
    save_value_function(small(patch_size=(6, 10), cls=T5ForMultimodalGenerationValueFunction), folder)
    with pytest.raises(UserError, match=r"value_function.pth holds encoder.image_dense.weight as \[32, 10\]"):
        T5ForMultimodalGenerationValueFunction.from_pretrained(folder)


def test_the_configs_image_field_has_a_name_of_its_own(tmp_path):
    """`patch_size` would be swallowed by the released model's argument of that name. Folders that have it load."""
    path = make_model(tmp_path / "model", patch_size=(5, 8)) / "config.json"
    config = json.loads(path.read_text())
    assert config["image_patch_size"] == [5, 8] and "patch_size" not in config
    again = T5ForMultimodalGeneration.from_pretrained(path.parent, patch_size=(5, 8))
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    for old in (False, True):
        if old:  # a folder of an earlier version
            config["patch_size"] = config.pop("image_patch_size")
            path.write_text(json.dumps(config))
        assert check_checkpoint(path.parent, (5, 8)).patch_size == (5, 8)
        for cls in BOTH:
            assert cls.from_pretrained(path.parent).config.patch_size == (5, 8)
    plain = make_model(tmp_path / "plain")
    assert not {"patch_size", "image_patch_size"} & json.loads((plain / "config.json").read_text()).keys()


def test_the_tokenizer_file_is_in_the_form_of_tokenizers_0_13(tmp_path, t5_tokenizer, problems):
    t5_tokenizer("a prompt", truncation=True, max_length=3)  # what a run leaves in the tokenizer's state
    t5_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    assert '"prepend_scheme"' in path.read_text()
    portable_tokenizer(tmp_path)
    written = json.loads(path.read_text())
    assert written["truncation"] is None and written["padding"] is None
    for part in (written["pre_tokenizer"], written["decoder"]):
        parts = part.get("pretokenizers") or part.get("decoders") or [part]
        (metaspace,) = [one for one in parts if one["type"] == "Metaspace"]
        assert metaspace["add_prefix_space"] is True and not {"prepend_scheme", "split"} & metaspace.keys()
    before = path.read_bytes()
    portable_tokenizer(tmp_path)
    assert path.read_bytes() == before
    never = {"type": "Metaspace", "prepend_scheme": "never", "split": True}
    write(tmp_path / "other/tokenizer.json", {"decoder": never})
    portable_tokenizer(tmp_path / "other")
    other = json.loads((tmp_path / "other/tokenizer.json").read_text())["decoder"]
    assert other == {"type": "Metaspace", "add_prefix_space": False}
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [problem["question"] + " " + problem["solution"] for problem in problems.values()][:200]
    texts += ["", " ", "  two  blanks ", "x\ny", "naïve café 水 <extra_id_3>", "</s> a"]
    ids = again(texts)["input_ids"]
    assert ids == t5_tokenizer(texts)["input_ids"]
    assert again.batch_decode(ids) == t5_tokenizer.batch_decode(ids)
