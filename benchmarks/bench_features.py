"""Feature extraction: images per second of extract_features.py's loop against one image at a time.

    python benchmarks/bench_features.py --size tiny --device cpu
    python benchmarks/bench_features.py --size base --device cpu      # the published network: 5 minutes on two cores

Real images of the sample through ViT-S/32 (`--size tiny`) or the network of the published features, ViT-L/32, of as
many patches; random weights, whose numbers do not change the time. `--model_name` names another. Ours works on four
times as many images, as folders are long. Checked first: the same features from both sides.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from ares import cli
from benchmarks import common, limits, released_recipe
from vision.extraction import FeatureStore, extract, keep_freed_memory, list_images
from vision.networks import MODEL_NAMES, load_encoder

MORE = 4  # times as many images on our side


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, argv, images=(56, "images per call"), model_name=("", "another timm network"))
    keep_freed_memory()  # as the script does; for both sides
    found = list(list_images(common.find_source().images).items())
    cli.refuse([f"--images: the sample has {len(found)}"] * (args.images > len(found)))
    name = args.model_name or ("vit_small_patch32_384" if args.size == "tiny" else MODEL_NAMES["vit"])
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
    result = common.compare(released, lambda: ours(many), args, (args.images, many))
    scaling = common.linear(ours, args.device, many) if args.size == "tiny" else {}
    common.profile(lambda: ours(args.images), args)
    per_image = result["ours"]["median"]
    pixels = [encoder.transform(released_recipe.read(path)) for _, path in found[: min(8, args.images)]]
    if args.device == "cuda":
        flops = limits.products(lambda: encoder(pixels)).flops() / len(pixels)
        limit = limits.utilisation(flops, per_image, args.device, torch.float32)
    else:
        limit = limits.share_of_products(lambda: encoder(pixels), args.device, len(pixels), per_image)
    common.report(
        args, "features", result, equal=equal, limit=limit, scaling=scaling,
        slice=f"{args.images} images, {many} of ours, {encoder.model_name}; per image",
        projection={"seconds_per_image": per_image},
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
