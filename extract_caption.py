"""Captions of all images by an image-to-text model: {"captions": {qid: text}}.

    python extract_caption.py --data_root images --output data/instruct_captions.json
    python extract_caption.py --data_root images --model Salesforce/instructblip-flan-t5-xl --batch_size 8

Folders {data_root}/{qid} are taken in the order of their numbers; the image is image.png, or else choice_0.png.
Decoding is greedy, on one GPU. After a kill the same command continues. Prefer MM-CoT's published
instruct_captions.json if you have it: new captions differ from those that the released models were trained on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ares.cli import HelpFormatter, UserError, in_one_line, print0, progress, refuse, run, warn0
from ares.files import read_json, writable_dir, write_json
from vision.extraction import list_images, read_record
from vision.networks import hub_failure, offline_unless_reachable, pick_device, read_image

PROMPT = "Write a short description for the image."


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--data_root", default="images", metavar="DIR", help="folder of {qid}/image.png")
    files.add_argument("--splits", nargs="+", metavar="NAME", help="its subfolders (default: those of train val test)")
    files.add_argument("--output", default="instruct_captions.json", metavar="FILE", help="caption file to write")
    files.add_argument("--overwrite", action="store_true", help="replace captions made with other settings")
    files.add_argument("--strict", action="store_true", help="stop at a broken image (default: a warning, no caption)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="Salesforce/instructblip-vicuna-7b", help="folder or hub id of the model")
    model.add_argument("--prompt", default=PROMPT, help='instruction for the model ("" for one that takes none)')
    model.add_argument("--max_new_tokens", type=int, default=40, help="longest caption, in tokens")
    running = parser.add_argument_group("running")
    running.add_argument("--batch_size", type=int, default=16, help="images at a time")
    running.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    running.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on cuda")
    args = parser.parse_args(argv)
    numbers = ("max_new_tokens", "batch_size")
    refuse([f"--{name}: {getattr(args, name)} is less than 1" for name in numbers if getattr(args, name) < 1])
    return args


def is_complete(output: Path, settings: dict[str, Any], images: dict[str, Path], overwrite: bool) -> bool:
    """Whether the caption file exists. Raises UserError if there is one for other images or with other settings."""
    if not output.exists() or overwrite:
        return False
    found = read_json(output, "--output", dict)
    parts = [found.get("captions"), found.get("broken")]
    known = {str(qid) for part in parts if isinstance(part, (dict, list)) for qid in part}
    if all(found.get(name) == value for name, value in settings.items()) and known == set(images):
        return True
    fault = f"{output} is there, for other images or by another model or prompt"
    raise UserError(f"--output: {fault}; add --overwrite to replace it, or name another file")


class Captioner:
    """An image-to-text model with its processor."""

    def __init__(self, model: str, prompt: str, device: str | None, dtype: str | None, max_new_tokens: int):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = pick_device(device)
        self.dtype = getattr(torch, dtype or ("bfloat16" if self.device.startswith("cuda") else "float32"))
        self.max_new_tokens = max_new_tokens
        if not os.path.isdir(model):
            offline_unless_reachable()
        try:
            # without trust_remote_code=False the library asks on the terminal whether to run code beside the weights
            self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
            self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=self.dtype, trust_remote_code=False)
        except Exception as error:  # the library has many errors for absent, unknown, damaged and unfit models
            why = in_one_line(error, 160) if os.path.isdir(model) else hub_failure(error)
            fault = f"cannot load {model} ({why})"
            raise UserError(f"--model: {fault}; name a folder with an image-to-text model") from error
        self.model.eval().to(self.device)
        self.prompt = prompt
        if getattr(self.processor, "chat_template", None):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            self.prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)

    def __call__(self, images: Sequence[Any]) -> list[str]:
        """One caption per RGB picture."""
        import torch

        # all have the same prompt, so nothing is padded
        text = {"text": [self.prompt] * len(images)} if self.prompt else {}
        inputs = self.processor(images=list(images), **text, return_tensors="pt").to(self.device, self.dtype)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)
        asked = inputs.get("input_ids")
        if asked is not None and ids.shape[1] >= asked.shape[1] and torch.equal(ids[:, : asked.shape[1]], asked):
            ids = ids[:, asked.shape[1] :]  # a decoder-only model repeats what it was given
        return [" ".join(text.split()) for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def caption(args: argparse.Namespace, images: dict[str, Path], record: dict[str, Any], part: Path) -> None:
    """Add the missing captions to `record`, which is written to `part` after every batch. Raises UserError at a broken
    image under --strict."""
    known = record["captions"].keys() | set(record["broken"])
    todo = [qid for qid in images if qid not in known]
    if not todo:
        return
    captioner = Captioner(args.model, args.prompt, args.device, args.dtype, args.max_new_tokens)
    print0(f"{args.model} on {captioner.device}, {captioner.dtype}")
    with progress(desc="captions", total=len(images), initial=len(images) - len(todo), unit="img") as bar:
        for start in range(0, len(todo), args.batch_size):
            batch = todo[start : start + args.batch_size]
            pictures = {}
            for qid in batch:
                try:
                    pictures[qid] = read_image(images[qid])
                except (OSError, ValueError) as error:
                    reason = f"question {qid}: cannot read {images[qid]}: {error}"
                    if args.strict:
                        raise UserError(f"--strict: {reason}") from error
                    warn0(f"{reason}; it gets no caption")
                    record["broken"].append(qid)
            record["captions"] |= zip(pictures, captioner(list(pictures.values())) if pictures else (), strict=True)
            write_json(part, record, indent=None)
            bar.update(len(batch))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    images = list_images(args.data_root, args.splits)
    output = Path(args.output)
    writable_dir(output.parent, "--output")
    settings = {"model": args.model, "prompt": args.prompt, "max_new_tokens": args.max_new_tokens}
    if is_complete(output, settings, images, args.overwrite):
        print0(f"{output}: captions of {len(images)} images, there already")
        return
    part = output.with_name(f".{output.name}.part")
    record = read_record(part, "--output", settings, {"captions": {}, "broken": []})
    if record["captions"]:
        print0(f"continuing after {len(record['captions'])} captions")
    caption(args, images, record, part)
    made = record.pop("captions")
    write_json(output, {"captions": {qid: made[qid] for qid in images if qid in made}, **record})
    part.unlink(missing_ok=True)
    broken = record["broken"]
    print0(f"{output}: captions of {len(images) - len(broken)} images" + f", {len(broken)} broken" * bool(broken))


if __name__ == "__main__":
    run(main)
