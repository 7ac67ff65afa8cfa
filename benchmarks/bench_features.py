"""Feature extraction: images per second of extract_features.py's loop against one image at a time.

    python benchmarks/bench_features.py --size tiny --device cpu
    python benchmarks/bench_features.py --size base --device cpu      # the published network: 5 minutes on two cores

Real images of the sample through ViT-S/32 (`--size tiny`) or the network of the published features, ViT-L/32, of as
many patches; random weights, whose numbers do not change the time. `--model_name` names another. Ours works on four
times as many images, as folders are long. Checked first: the same features from both sides.
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

from ares import cli
from benchmarks import common, limits, released_recipe
from vision.extraction import FeatureStore, extract, keep_freed_memory, list_images
from vision.networks import MODEL_NAMES, load_encoder

NETWORKS = {"tiny": "vit_small_patch32_384"}  # other sizes: that of the published ViT features
MORE = 4  # times as many images on our side


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=56, help="images per call (default: %(default)s)")
    parser.add_argument("--model_name", help="another timm network")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = common.set_up(args)
    keep_freed_memory()  # as the script does; for both sides
    found = list(list_images(common.find_source(args).images).items())
    cli.refuse([f"--images: the sample has {len(found)}"] * (args.images > len(found)))
    name = args.model_name or NETWORKS.get(args.size, MODEL_NAMES["vit"])
    encoder = load_encoder("vit", name, "random", args.device)

    def ours(count: int) -> np.ndarray:
        images = {str(n): found[n % len(found)][1] for n in range(count)}
        with tempfile.TemporaryDirectory() as out:
            settings = {"img_type": "vit", "dtype": "float32", "rows": count}
            store = FeatureStore(Path(out), settings, encoder.stored)
            extract(encoder, images, store)
            return np.array(store.array)

    def released() -> torch.Tensor:
        return released_recipe.image_features(encoder, [path for _, path in found[: args.images]])

    equal = [common.check("features of every image", released(), torch.from_numpy(ours(args.images)), 1e-3)]
    many = MORE * args.images
    result = common.compare(released, lambda: ours(many), args, (args.images, many), warm_up=False)
    once = argparse.Namespace(**vars(args) | {"repeats": 1})
    scaling = common.linear(lambda n: ours(n * many), once) if args.size == "tiny" else {}
    common.profile(lambda: ours(args.images), args)
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
        limit=limit, scaling=scaling, slice=f"{args.images} images, {many} of ours, {encoder.model_name}; per image",
        projection={"seconds_per_image": per_image},
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
