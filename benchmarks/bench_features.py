"""Feature extraction: images per second of extract_features.py against one image at a time.

    python benchmarks/bench_features.py --size tiny --device cpu
    python benchmarks/bench_features.py --size base --device cpu      # the published network: 5 minutes on two cores

Images of the sample through ViT-S/32 (`--size tiny`) or the network of the published features, ViT-L/32, which makes
as many patches; random weights take the same time. `--model_name` names another. Ours is the script in a process of
its own, timed from the line that says the network is loaded to its last one, on four times as many images, as folders
are large. Checked first: the same features from both sides.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import cli
from benchmarks import common, limits, released_recipe
from vision.memory import keep_freed_memory
from vision.networks import MODEL_NAMES, list_images, load_encoder

NETWORKS = {"tiny": "vit_small_patch32_384"}  # other sizes: that of the published ViT features
MORE = 4  # times as many images on our side


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=56, help="images per call (default: %(default)s)")
    parser.add_argument("--model_name", help="another timm network")
    return parser.parse_args(argv)


def extract(args: argparse.Namespace, name: str, paths: Sequence[Path]) -> tuple[float, torch.Tensor]:
    """(seconds, features) of extract_features.py over `paths`, without the start of its process."""
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths):
            target = Path(folder, "images", str(number), f"image{path.suffix}")
            target.parent.mkdir(parents=True)
            shutil.copyfile(path, target)
        command = [sys.executable, common.ROOT / "extract_features.py", "--data_root", f"{folder}/images",
                   "--output_dir", f"{folder}/out", "--random_weights", "--device", args.device,
                   "--model_name", name]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as script:
            times = {line.strip(): time.perf_counter() for line in script.stdout}
        began = [seconds for line, seconds in times.items() if line.startswith(name)]
        cli.refuse(["extract_features.py failed"] * (script.returncode != 0 or not began))
        return max(times.values()) - began[0], torch.load(f"{folder}/out/vit.pth", weights_only=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = common.set_up(args)
    keep_freed_memory()  # as the script does
    source = common.find_source(args)
    found = list(list_images(source.images).values())
    cli.refuse([f"--images: the sample has {len(found)}"] * (args.images > len(found)))
    name = args.model_name or NETWORKS.get(args.size, MODEL_NAMES["vit"])
    encoder = load_encoder("vit", name, "random", args.device)

    def ours(count: int) -> float:
        """Seconds of the script for `count` images."""
        return extract(args, name, [found[n % len(found)] for n in range(count)])[0]

    def released() -> torch.Tensor:
        return released_recipe.image_features(encoder, found[: args.images])

    equal = [common.check("features of every image", released(), extract(args, name, found[: args.images])[1], 1e-3)]
    many = MORE * args.images
    result = common.compare(
        released, lambda: ours(many), args, (args.images, many), warm_up=False,
        time_of=lambda function, device: function() if function is not released else common.seconds(released, device),
    )  # fmt: skip
    per_image = result["ours"]["median"]
    scaling = {f"{n}x": ours(n * many) / (n * many) / per_image for n in (2, 4)} if args.size == "tiny" else {}
    pixels = [encoder.transform(released_recipe.read(path)) for path in found[: min(8, args.images)]]
    common.profile(lambda: encoder(pixels), args)
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
