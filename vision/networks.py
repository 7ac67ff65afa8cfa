"""Vision networks: from an image file to its patch features.

    encoder = load_encoder("vit", weights="random")
    encoder([encoder.transform(read_image(path))]).shape  # (1, 145, 1024)

The four kinds are those of MM-CoT (arXiv 2302.00923): ViT's token states, CLIP's grid before its attention pool,
ResNet's pooled vector (the model repeats it), DETR's last decoder states. Whole folders of images: extraction.py;
reading feature files: features.py. torch is imported by the functions that need it: flags are checked before it loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ares.cli import UserError, in_one_line, warn0
from ares.images import eight_bit, open_image, upright

if TYPE_CHECKING:
    import torch
    from PIL import Image

# the networks of the published features; detr is transformers', the others are timm's
MODEL_NAMES = {
    "vit": "vit_large_patch32_384.orig_in21k_ft_in1k",
    "clip": "resnet50_clip.openai",
    "resnet": "resnet50.tv_in1k",
    "detr": "facebook/detr-resnet-101-dc5",
}
RESNET_REPEATS = 512  # patches that the model sees of resnet's one vector
SHORTEST_SIDE = 224  # pixels, of an image for detr, as released
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_image(path: str | Path, turned: bool = False) -> Image.Image:
    """Decode an image as RGB. Raises OSError or ValueError if the file is broken or too large. `turned` applies the
    EXIF orientation; the published features were made without it, so a data set's are, too."""
    with open_image(path) as image:
        return eight_bit(upright(image) if turned else image).convert("RGB")


@dataclass
class Encoder:
    """A vision network and its preprocessing. `stored`: shape of one image's features in the file, (patches, dim), or
    (dim,) for resnet; `shape`: what the model sees, always (patches, dim)."""

    img_type: str
    model_name: str
    weights: str  # "pretrained", "random" or "local"
    network: Any
    transform: Callable[[Image.Image], torch.Tensor]
    stored: tuple[int, ...] = ()

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features of transformed images, float32 (B, *stored) on the CPU. Images may differ in size."""
        import torch

        groups = by_size(images)
        order = torch.tensor([position for positions, _ in groups for position in positions])
        return torch.cat([self.features(pixels) for _, pixels in groups])[order.argsort()]

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of images of one size (B, 3, H, W): float32 (B, *stored) on the CPU."""
        import torch

        with torch.inference_mode():
            return self._forward(pixels.to(next(self.network.parameters()).device, non_blocking=True)).float().cpu()

    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.img_type == "detr":
            return self.network(pixel_values=pixels).last_hidden_state  # (B, queries, d)
        features = self.network.forward_features(pixels)  # (B, tokens, d), or (B, d, H, W), or (B, H, W, d)
        if self.img_type == "resnet":
            return self.network.forward_head(features, pre_logits=True)  # (B, d)
        if features.ndim == 4:
            grid = features.permute(0, 2, 3, 1) if features.shape[1] == self.network.num_features else features
            features = grid.flatten(1, 2)
        return features

    @property
    def shape(self) -> tuple[int, int]:
        return (RESNET_REPEATS, *self.stored) if len(self.stored) == 1 else self.stored


def by_size(images: Sequence[torch.Tensor]) -> list[tuple[list[int], torch.Tensor]]:
    """(positions, images stacked) for every size among them, so that no image is padded."""
    import torch

    groups: dict[tuple, list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(position)
    return [(alike, torch.stack([images[position] for position in alike])) for _, alike in sorted(groups.items())]


class LiveFeatures:
    """Features that are computed now, with the `gather` of `vision.features.VisionFeatures`.

    `pictures`: qid -> image file, or None for a question without one, which gets zeros; `turned`: see `read_image`.
    """

    def __init__(self, encoder: Encoder, pictures: Mapping[str, Path | None], turned: bool = False):
        self.shape = encoder.shape
        shown = {qid: path for qid, path in pictures.items() if path is not None}
        rows = encoder([encoder.transform(read_image(path, turned)) for path in shown.values()]) if shown else []
        self.rows = dict(zip(shown, rows, strict=True))

    def gather(self, qids: Sequence[str]) -> torch.Tensor:
        """float32 (B, patches, dim); a single vector is repeated over all patches."""
        import torch

        blank = torch.zeros(self.shape)
        return torch.stack([self.rows[qid].expand(self.shape) if qid in self.rows else blank for qid in qids])


def pick_device(asked: str | None) -> str:
    """--device, else cuda if there is one. Raises UserError if the device cannot be used."""
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=asked).cpu()
    except Exception as error:  # the type differs for an unknown name, an absent driver and a number too high
        why = in_one_line(error, 100)
        raise UserError(f"--device: {asked} cannot be used here ({why}); name another, such as cpu") from error
    return asked


def load_encoder(
    img_type: str, model_name: str | None = None, weights: str = "pretrained", device: str = "cpu", seed: int = 0,
    flag: str = "--weights",
) -> Encoder:  # fmt: skip
    """Build the network of `img_type`.

    `model_name`: another network of that kind, of timm, or for detr a DETR of transformers (default: `MODEL_NAMES`);
    `weights`: "pretrained" (from the hub), "random" (from `seed`), else a file or folder, which `flag` named.
    Raises UserError if the name is unknown, or the weights are absent or do not fit.
    """
    import torch

    # the same bytes in every run, and float32 as it says: by default cuDNN's convolutions round to TF32's 10 bits
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    name = model_name or MODEL_NAMES[img_type]
    kind = weights if weights in ("pretrained", "random") else "local"
    if kind == "local" and not Path(weights).exists():
        raise UserError(f"{flag}: {weights} does not exist")
    if kind == "pretrained":
        offline_unless_reachable()
    if kind == "random":
        warn0(f"{name}: RANDOM WEIGHTS - the features hold colours and layout at best; for trials only")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, transform = (_load_detr if img_type == "detr" else _load_timm)(name, kind, weights, flag)
    network.eval().requires_grad_(False).to(device)
    encoder = Encoder(img_type, name, kind, network, transform)
    from PIL import Image

    encoder.stored = tuple(encoder([transform(Image.new("RGB", (64, 64)))]).shape[1:])
    if len(encoder.stored) != (1 if img_type == "resnet" else 2):
        raise UserError(f"--model_name: {name} gives features of shape {encoder.stored}; name another for {img_type}")
    return encoder


def _load_timm(name: str, kind: str, weights: str, flag: str) -> tuple[Any, Callable]:
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3]) or "none"
        raise UserError(f"--model_name: timm {timm.__version__} has no model {name} (similar: {near})")
    # timm gets tensors, never a path: some of its readers execute what a file pickles
    source = {"pretrained_cfg_overlay": {"state_dict": read_weights(Path(weights), flag)}} if kind == "local" else {}
    try:
        # with its own number of classes: timm refuses some published heads otherwise, and nothing uses them
        network = timm.create_model(name, pretrained=kind != "random", **source)
    except Exception as error:  # hub, HTTP and shape errors of three libraries
        raise _no_weights(name, kind, weights, flag, error) from error
    for settings in (network.pretrained_cfg, network.default_cfg):
        settings.pop("state_dict", None)  # a second copy of the weights
    config = timm.data.resolve_model_data_config(network)
    return network, timm.data.create_transform(**config, is_training=False)


def read_weights(path: Path, flag: str = "--weights") -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors or PyTorch file, or in the first such file of a folder; nothing is executed. In
    a training checkpoint the order is timm's: EMA weights, then `state_dict`, then `model`. Raises UserError."""
    from timm.models import clean_state_dict

    from ares.checkpoints import load_state_dict

    if path.is_dir():
        files = [*sorted(path.glob("*.safetensors")), *sorted(path.glob("*.bin"))]
        if not files:
            raise UserError(f"{flag}: {path} holds no .safetensors or .bin file; name the file")
        path = files[0]
    inner = ("state_dict_ema", "model_ema", "state_dict", "model")
    return clean_state_dict(load_state_dict(path, flag, inner=inner))


def _load_detr(name: str, kind: str, weights: str, flag: str) -> tuple[Any, Callable]:
    from torchvision import transforms
    from transformers import DetrConfig, DetrModel

    try:
        if kind != "random":
            network = DetrModel.from_pretrained(weights if kind == "local" else name)
        elif Path(name).is_dir():
            network = DetrModel(DetrConfig.from_pretrained(name))
        else:  # ResNet-101-DC5: dilated last stage, stride 16
            backbone = {"model_type": "timm_backbone", "backbone": "resnet101", "features_only": True}
            backbone |= {"use_pretrained_backbone": False, "out_indices": [1, 2, 3, 4], "output_stride": 16}
            network = DetrModel(DetrConfig(backbone_config=backbone, dilation=True))
    except Exception as error:
        raise _no_weights(name, kind, weights, flag, error) from error
    normalize = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return network, transforms.Compose([transforms.Resize(SHORTEST_SIDE), transforms.ToTensor(), normalize])


def offline_unless_reachable() -> None:
    """Try once to reach the hub; if it fails, go offline, so that a file that is not cached fails without retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whatever the HTTP library of this version of the hub client raises
        constants.HF_HUB_OFFLINE = True


def hub_failure(error: Exception) -> str:
    """Why a file could not be downloaded from the hub, on one line."""
    from huggingface_hub import constants

    offline = "not in the cache, and the hub cannot be reached"
    return offline if constants.HF_HUB_OFFLINE else in_one_line(error, 160)


def _no_weights(name: str, kind: str, weights: str, flag: str, error: Exception) -> UserError:
    if kind == "local":
        return UserError(f"{flag}: {weights} does not fit {name} ({in_one_line(error, 160)})")
    if kind == "random":
        return UserError(f"--model_name: cannot build {name} ({in_one_line(error, 160)})")
    fix = f"name them by {flag} PATH" + ", or try things out with --random_weights" * (flag == "--weights")
    why = hub_failure(error)
    return UserError(f"--model_name: no weights of {name} from the hub ({why}); download them elsewhere and {fix}")
