"""Vision features of all images, one row each: {output_dir}/{vit.pth,detr.npy,clip.npy,resnet.npy}.

    python extract_features.py --data_root images --output_dir vision_features --img_type vit
    python extract_features.py --data_root images --output_dir vision_features --img_type vit \\
        --model_name test_vit --random_weights                            # a trial without any weights

Rows are the folders {data_root}/{qid} sorted by number; the image is image.png, or else choice_0.png. Written beside
the features: name_map.json (qid -> row) and {img_type}.json (shape, network, weights, rows, broken images). After a
kill the same command continues, and gives the same bytes. It uses one GPU, which does ScienceQA's 11,208 images in
minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ares.cli import IMG_TYPES, HelpFormatter, UserError, print0, refuse, run
from ares.files import read_json, writable_dir, write_json
from vision.extraction import FeatureStore, changed, extract, keep_freed_memory, list_images
from vision.networks import MODEL_NAMES, load_encoder, pick_device

FILES = {"vit": "vit.pth", "detr": "detr.npy", "clip": "clip.npy", "resnet": "resnet.npy"}  # the released names


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--data_root", default="images", metavar="DIR", help="folder of {qid}/image.png")
    files.add_argument("--splits", nargs="+", metavar="NAME", help="its subfolders (default: those of train val test)")
    files.add_argument("--output_dir", default="vision_features", metavar="DIR", help="where the features go")
    files.add_argument("--overwrite", action="store_true", help="replace features made with other settings")
    files.add_argument("--strict", action="store_true", help="stop at a broken image (default: warn, a row of zeros)")
    network = parser.add_argument_group("network")
    network.add_argument("--img_type", choices=IMG_TYPES, default="vit", help="kind of features")
    network.add_argument("--model_name", help="another model of timm (detr: transformers)")
    network.add_argument("--weights", metavar="PATH", help="weights on disk (default: from the hub)")
    network.add_argument("--random_weights", action="store_true", help="random weights: for trials only")
    network.add_argument("--seed", type=int, default=0, help="seed of --random_weights")
    running = parser.add_argument_group("running")
    running.add_argument("--batch_size", type=int, default=16, help="images at a time")
    text = "processes that decode images (default: one per core; on a CPU 0)"
    running.add_argument("--workers", type=int, help=text)
    running.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    running.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="type of stored numbers")
    args = parser.parse_args(argv)
    refuse(
        ["--batch_size: at least 1 image at a time"] * (args.batch_size < 1)
        + ["--workers: a number of processes cannot be negative"] * ((args.workers or 0) < 0)
        + ["--weights and --random_weights contradict: drop one"] * bool(args.weights and args.random_weights)
    )
    return args


def describe(args: argparse.Namespace, images: dict[str, Path]) -> dict[str, Any]:
    """What the features depend on, recorded beside them. Of the images it holds names and sizes, not contents."""
    listing = "".join(f"{qid} {path.name} {os.path.getsize(path)}\n" for qid, path in images.items())
    weights = file = "pretrained"
    if args.random_weights:
        weights, file = "random", f"seed {args.seed}"
    elif args.weights:
        size = f" ({os.path.getsize(args.weights)} bytes)" if os.path.isfile(args.weights) else ""
        weights, file = "local", Path(args.weights).name + size
    return {
        "img_type": args.img_type, "model_name": args.model_name or MODEL_NAMES[args.img_type], "weights": weights,
        "weights_file": file, "dtype": args.dtype, "rows": len(images),
        "images": hashlib.sha256(listing.encode()).hexdigest(),
    }  # fmt: skip


def check_output(out: Path, settings: dict[str, Any], name_map: dict[str, int], overwrite: bool) -> bool:
    """Whether the features exist. Raises UserError if there are some made with other settings."""
    if overwrite:
        return False
    kind = settings["img_type"]
    file, sidecar, map_file = out / FILES[kind], out / f"{kind}.json", out / "name_map.json"
    fault = None
    if file.exists():
        other = changed(settings, read_json(sidecar, "--output_dir", dict)) if sidecar.exists() else ["origin"]
        fault = f"{file} is there, made with another {', '.join(other)}" if other else None
    if not fault and map_file.exists() and read_json(map_file, "--output_dir") != name_map:
        fault = f"{map_file} numbers other images, so other features in {out} would no longer fit"
    if fault:
        raise UserError(f"--output_dir: {fault}; add --overwrite to replace it, or name another folder")
    return file.exists()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    images = list_images(args.data_root, args.splits)
    out = writable_dir(args.output_dir, "--output_dir")
    settings = describe(args, images)
    name_map = {qid: row for row, qid in enumerate(images)}
    file, map_file = out / FILES[args.img_type], out / "name_map.json"
    if check_output(out, settings, name_map, args.overwrite):
        if not map_file.exists():
            write_json(map_file, name_map)
        print0(f"{file}: {len(images)} rows, there already")
        return

    keep_freed_memory()
    device = pick_device(args.device)
    weights = "random" if args.random_weights else args.weights or "pretrained"
    encoder = load_encoder(args.img_type, args.model_name, weights, device, args.seed)
    print0(f"{settings['model_name']} ({encoder.weights} weights) on {device}: {encoder.shape} per image")
    store = FeatureStore(out, settings, encoder.stored)
    extract(encoder, images, store, args.batch_size, args.workers, args.strict)
    broken = store.record["broken"]
    # the features are written last: if they exist, the other files do, too
    file.unlink(missing_ok=True)
    write_json(map_file, name_map)
    write_json(out / f"{args.img_type}.json", {"shape": list(encoder.shape), **settings, "broken": broken})
    store.finish(file)
    zeros = f", {len(broken)} broken images as zeros" if broken else ""
    print0(f"{file}: {len(images)} rows of {encoder.stored}{zeros}")


if __name__ == "__main__":
    run(main)
