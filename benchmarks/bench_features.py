"""Feature extraction: images per second of extract_features.py's loop against one image at a time.

    python benchmarks/bench_features.py --device cpu

Real images of the sample, through the network of the published ViT features with random weights (the numbers of a
network do not change its time); `--model_name` names another. `--size` has no effect on it. Checked first: the same
features from both sides.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import extract_features
from ares import cli
from benchmarks import common, limits, released_recipe
from utils_vision import list_images, load_encoder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=40, help="images per call (default: %(default)s)")
    parser.add_argument("--model_name", help="another timm network (default: that of the published ViT features)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = common.set_up(args)
    found = list(list_images(common.SHARED / "data/scienceqa_sample/images").items())
    named = ["--model_name", args.model_name] if args.model_name else []
    flags = extract_features.parse_args(["--random_weights", "--device", args.device, *named])
    encoder = load_encoder("vit", args.model_name, "random", args.device)

    def ours(count: int = args.images) -> np.ndarray:
        images = {str(n): found[n % len(found)][1] for n in range(count)}
        with tempfile.TemporaryDirectory() as out:
            rows = extract_features.Rows(Path(out), extract_features.describe(flags, images), encoder.stored)
            extract_features.extract(encoder, images, rows, flags)
            return np.array(rows.array)

    def released() -> torch.Tensor:
        return released_recipe.image_features(encoder, [path for _, path in found[: args.images]])

    equal = [common.check("features of every image", released(), torch.from_numpy(ours()), 1e-3)]
    result = common.compare(released, ours, args, (args.images, args.images), warm_up=False)
    once = argparse.Namespace(**vars(args) | {"repeats": 1})
    scaling = common.linear(lambda n: ours(n * args.images), once)
    common.profile(ours, args)
    per_image = result["ours"]["median"]
    pixels = [encoder.transform(released_recipe.read(path)) for _, path in found[: min(8, args.images)]]
    products = limits.products(lambda: encoder(pixels))
    if device.type == "cuda":
        peak = limits.peak_flops(device, torch.float32)
        limit = f"model FLOP utilisation {products.flops() / len(pixels) / per_image / peak:.0%} of the fp32 peak"
    else:
        limit = f"bare matrix products take {products.seconds(device) / len(pixels) / per_image:.0%} of our time"
    common.report(
        args, "feature extraction", result, target=">= 1.3x" if args.device == "cpu" else ">= 30x", equal=equal,
        limit=limit, scaling=scaling, slice=f"{args.images} images, {encoder.model_name}; seconds per image",
        projection={"seconds_per_image": per_image},
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
