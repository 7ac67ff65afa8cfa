"""Ask about one question: prints the model's rationale and the answer; features of a new picture are made on the way.

    python tools/predict.py --model experiments/RUN --lora experiments/RUN/mm_cot_lora_... --image map.png \\
        --question "Which of these states is farthest north?" --choices "West Virginia" Louisiana Arizona Oklahoma
    python tools/predict.py --model experiments/RUN --qid 11 --data_root data          # a question of a data folder
    python tools/predict.py --model models/rationale --answer_model models/answer --question ... --choices ...

--model writes the rationale. --lora, an adapter on --model, or --answer_model answers; the prompt of one that was
trained on given rationales (QCMG-A) holds the rationale. Prompt format, lengths and kind of features are those in the
args.yaml of each folder, which training wrote; flags override them, and stand in for them with released checkpoints.
A question of a data folder uses its stored features if there are any. Decoding is greedy, as for the scores. For many
questions at once: main.py --evaluate_dir.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ares import cli, data_folder
from ares.cli import CAPTION_DEFAULT, IMG_TYPES, PROMPT_FORMATS, UserError, print0, run
from ares.files import read_json, read_yaml
from sft import run as sft_run
from sft.lora import check_adapter, load_adapter
from utils_prompt import answer_letter, option_letters

RATIONALE_FORMAT, ANSWER_FORMAT = "QCM-E", "QCM-A"  # of folders without args.yaml: the paper's commands


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument_group("models").add_argument
    add("--model", required=True, metavar="DIR", help="model that writes rationales (or also answers)")
    add("--lora", metavar="DIR", help="adapter on --model that answers")
    add("--answer_model", metavar="DIR", help="another model, which answers")
    add("--tokenizer", metavar="DIR", help="tokenizer (default: the checkpoint's own)")
    add("--prompt_format", choices=PROMPT_FORMATS, help="of --model (default: as trained, else QCM-E)")
    add("--answer_format", choices=PROMPT_FORMATS, help="of what answers (default: as trained, else QCM-A)")
    add("--use_caption", type=cli.str2bool, metavar="BOOL", help="use captions (default: as trained, else True)")
    add("--output_len", type=int, help="longest rationale, in tokens (default: as trained, else 512)")
    add("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    cli.add_decode_graph(parser)
    add = parser.add_argument_group("a question of your own").add_argument
    add("--question", metavar="TEXT", help="the question")
    add("--choices", nargs="+", metavar="TEXT", help="its choices, 2 to 5")
    add("--image", metavar="FILE", help="its picture (default: none, features of zeros)")
    add("--hint", default="", metavar="TEXT", help="its context")
    add("--caption", default="", metavar="TEXT", help="a caption of the picture, added to the hint")
    add = cli.add_data_flags(parser).add_argument
    add("--qid", help="ask a question of --data_root")
    add("--caption_file", default=CAPTION_DEFAULT, help="captions, if the model was trained with them")
    add = parser.add_argument_group("vision features").add_argument
    add("--img_type", choices=IMG_TYPES, help="kind of features (default: as trained)")
    add("--vision_features", help="folder of feature files; a new picture gets the same network")
    add("--name_map", help="qid -> feature row (default: beside the features, then in --data_root)")
    add("--vision_model", help="the network that made the features (default: as recorded there)")
    add("--vision_weights", metavar="PATH", help="its weights, if not from the hub")
    args = parser.parse_args(argv)
    given = cli.given_flags(parser, argv)
    unused = {"data_root", "dataset", "images"}, {"question", "choices", "image", "hint", "caption"}
    by_qid, fmt = "qid" in given, args.answer_format
    faults = [
        (by_qid == ("question" in given), "name either --qid, or --question with --choices"),
        *((True, f"--{name} has no effect {'with' if by_qid else 'without'} --qid")
          for name in sorted(given & unused[by_qid])),
        ("question" in given and "choices" not in given, "--question needs --choices"),
        (args.lora and args.answer_model, "--lora and --answer_model both answer: drop one"),
        (fmt and not (args.lora or args.answer_model), "--answer_format: no effect without --lora or --answer_model"),
        (fmt and not fmt.endswith("-A"),
         f"--answer_format: {fmt} asks for more than the answer; QCM-A or QCMG-A do not"),
        (args.image and not Path(args.image).is_file(), f"--image: {args.image} does not exist"),
        ((args.output_len or 2) < 2, f"--output_len must be at least 2, not {args.output_len}"),
    ]  # fmt: skip
    cli.refuse([message for fault, message in faults if fault])
    return args


# -- how a model was trained -----------------------------------------------------------------------------

LENGTH = (512, lambda value: type(value) is int and 2 <= value <= 10**6)
PLACE = (None, lambda value: value is None or isinstance(value, str) and 0 < len(value) < 4096)
RECORDED = {  # flag of training -> (default, whether a value can be one)
    "prompt_format": (None, lambda value: value in PROMPT_FORMATS),
    "img_type": (None, lambda value: value is None or value in IMG_TYPES),
    "use_caption": (True, lambda value: isinstance(value, bool)),
    "options": (list("ABCDE"), lambda value: isinstance(value, list) and 2 <= len(value) <= 26
                and all(isinstance(letter, str) and letter for letter in value)),
    "seed": (42, lambda value: type(value) is int),
    "input_len": LENGTH, "output_len": LENGTH,
    "data_root": PLACE, "dataset": PLACE, "vision_features": PLACE, "name_map": PLACE, "caption_file": PLACE,
}  # fmt: skip


def training_flags(folder: str | Path, default_format: str, prompt_format: str | None) -> argparse.Namespace:
    """The flags of training in `folder`/args.yaml, with defaults for those that are absent, and those that
    `sft.predict.Predictor` needs. `recorded` holds the flags that the file has. Raises UserError for a value that no
    training writes."""
    path = Path(folder) / "args.yaml"
    recorded = read_yaml(path, "--model") if os.path.lexists(path) else {}
    for name, (_, fits) in RECORDED.items():
        if name in recorded and not fits(recorded[name]):
            raise UserError(f"--model: {path}: {name} is {repr(recorded[name])[:60]}, which no training writes")
    if not prompt_format and "prompt_format" not in recorded:
        print0(f"note: {folder} has no args.yaml; its prompt format is taken to be {default_format}")
    flags = {name: recorded.get(name, default) for name, (default, _) in RECORDED.items()}
    flags["prompt_format"] = prompt_format or flags["prompt_format"] or default_format
    return argparse.Namespace(**flags, recorded=recorded, use_generate=True, eval_bs=1, eval_acc=None)


def check_formats(args: argparse.Namespace, rationale: argparse.Namespace, answer: argparse.Namespace | None) -> None:
    """Raise UserError if a model's prompt format does not fit its place in the chain of rationale and answer."""
    fmt = rationale.prompt_format
    if fmt.startswith("QCMG"):
        raise UserError(f"--model: {args.model} was trained on given rationales ({fmt}); name the model that writes "
                        "them with --model, and this one with --answer_model")  # fmt: skip
    if answer is None:
        return
    if fmt.endswith("-A"):
        raise UserError(f"--model: {args.model} answers itself ({fmt}); drop --lora or --answer_model")
    if not answer.prompt_format.endswith("-A"):
        flag = "--lora" if args.lora else "--answer_model"
        raise UserError(f"{flag}: it was trained for {answer.prompt_format}, not to answer (QCM-A, QCMG-A); name "
                        "another, or --answer_format")  # fmt: skip


# -- the question ----------------------------------------------------------------------------------------


@dataclass
class Question:
    qid: str
    problem: dict[str, Any]
    image: Path | None
    of_data: bool  # from a data folder, so it has a gold answer and may have stored features


def read_question(args: argparse.Namespace, use_caption: bool) -> Question:
    """The question of the flags, or of the data folder. Raises UserError."""
    if args.qid is None:
        problem = {"question": args.question, "choices": args.choices, "answer": 0, "hint": args.hint}
        problem |= {"image": args.image, "lecture": "", "solution": "", "caption": args.caption}
        if fault := data_folder.problem_fault("question", problem):
            raise UserError(f"--choices: the question {fault}")
        if args.caption and not use_caption:
            raise UserError("--caption: the model was trained without captions; drop it, or say it in --hint")
        return Question("question", problem, Path(args.image) if args.image else None, False)
    data = data_folder.read_data_folder(args.data_root, args.dataset)
    if args.qid not in data.problems:
        raise UserError(f"--qid: {args.data_root}/{data.dataset}/problems.json has no question {args.qid}")
    problem = data.problems[args.qid]
    problem["caption"] = ""
    if use_caption:
        try:
            path = data_folder.find_captions(args)
        except UserError as error:
            raise UserError(f"{error} (or without captions: --use_caption False)") from None
        problem["caption"] = data_folder.load_captions(path).get(args.qid, "")
    folder = data_folder.find_images(args)
    images = data_folder.question_images(folder, args.qid) if folder else []
    return Question(args.qid, problem, images[0] if images else None, True)


def kind_of_features(args: argparse.Namespace, recorded: str | None) -> str | None:
    """--img_type, else that of training, else the one that fits the checkpoint; None for a text-only model."""
    from model import read_checkpoint, types_that_fit

    patch_size = read_checkpoint(Path(args.model), "--model").patch_size if Path(args.model).is_dir() else None
    if args.img_type or recorded:
        return args.img_type or recorded
    fitting = types_that_fit(patch_size) if patch_size else []
    if patch_size and len(fitting) != 1:
        fix = f"name one of {', '.join(fitting)}" if fitting else "name the kind it was trained with"
        raise UserError(f"--img_type: {args.model} does not tell which features it takes; {fix}")
    return fitting[0] if fitting else None


def features_for(args: argparse.Namespace, question: Question, settings: argparse.Namespace) -> Any:
    """The stored features of a data folder's question if there are any, else features computed from the picture."""
    import utils_data

    # the places that training used, unless the question is from another data folder
    recorded = settings.recorded
    if question.of_data and Path(recorded.get("data_root") or "").resolve() != Path(args.data_root).resolve():
        recorded = {}
    names = ("vision_features", "name_map", "dataset")
    where = argparse.Namespace(**{name: getattr(args, name) or recorded.get(name) for name in names})
    where.img_type, where.data_root, where.caption_file = args.img_type, args.data_root, args.caption_file
    if not question.of_data:
        where.data_root = recorded.get("data_root") or args.data_root
        where.caption_file = recorded.get("caption_file") or CAPTION_DEFAULT
    try:
        file = data_folder.find_feature_file(where)
    except UserError:
        if args.vision_features:
            raise
        file = None
    if question.of_data and file is not None:
        stored = utils_data.open_features(where)
        if question.qid in stored.name_map or question.image is None:
            print0(f"features: {file}")
            return stored
    name, weights, seed = network_of(args, file)
    from vision.networks import LiveFeatures, load_encoder

    encoder = load_encoder(args.img_type, name, weights, args.device, seed, "--vision_weights")
    print0(f"features: {encoder.model_name} ({encoder.weights} weights), {question.image or 'no picture: zeros'}")
    try:
        # a data set's features are made without the EXIF orientation; a user's own photo is shown upright
        return LiveFeatures(encoder, {question.qid: question.image}, turned=not question.of_data)
    except (OSError, ValueError) as error:
        raise UserError(f"--image: cannot read {question.image} ({error})") from error


def network_of(args: argparse.Namespace, file: Path | None) -> tuple[str | None, str, int]:
    """(name, weights, seed) of the network that made `file`, by the JSON beside it; flags override."""
    sidecar = file.with_name(f"{args.img_type}.json") if file else None
    made_by = read_json(sidecar, "--vision_features", dict) if sidecar and sidecar.is_file() else {}
    if not all(isinstance(made_by.get(key, ""), str) for key in ("weights", "model_name")):
        raise UserError(f"--vision_features: {sidecar} is not what extract_features.py writes; make both again")
    weights = args.vision_weights or made_by.get("weights", "pretrained")
    if weights == "local":
        fix = f"the features were made with the weights {made_by.get('weights_file')}; name that file"
        raise UserError(f"--vision_weights: {fix}")
    seed = re.fullmatch(r"seed (\d+)", str(made_by.get("weights_file")))
    return args.vision_model or made_by.get("model_name"), weights, int(seed[1]) if seed else 0


# -- asking ----------------------------------------------------------------------------------------------


def ask(
    model: Any, tokenizer: Any, question: Question, features: Any, settings: argparse.Namespace, given: str | None
) -> str:
    """What `model` generates, by the loop that makes the prediction files. `given`: a rationale for QCMG formats."""

    from sft.predict import Predictor
    from utils_data import Collator, RationaleDataset

    problems, le = {question.qid: question.problem}, None if given is None else {question.qid: given}
    dataset = RationaleDataset(problems, [question.qid], tokenizer, settings, le)
    device = next(model.parameters()).device
    collator = Collator(tokenizer.pad_token_id, features, device=device)
    predictor = Predictor(settings, problems, tokenizer, collator, device)
    return predictor.decode(predictor.predict(model, dataset, "write"))[0]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.lora:
        check_adapter(Path(args.lora), "--lora")
    settings = training_flags(args.model, RATIONALE_FORMAT, args.prompt_format)
    settings.output_len = args.output_len or settings.output_len
    answering = args.lora or args.answer_model
    answer_settings = training_flags(answering, ANSWER_FORMAT, args.answer_format) if answering else None
    for flags in filter(None, (settings, answer_settings)):
        flags.decode_graph = args.decode_graph
        if args.use_caption is not None:
            flags.use_caption = args.use_caption
    check_formats(args, settings, answer_settings)
    question = read_question(args, settings.use_caption)

    from model import T5ForMultimodalGeneration, check_checkpoint
    from utils_data import check_vocabulary, load_tokenizer
    from utils_evaluate import extract_answer
    from vision.networks import pick_device

    args.device = pick_device(args.device)
    args.img_type = kind_of_features(args, settings.img_type)
    if args.img_type is None and args.image:
        raise UserError(f"--image: {args.model} reads no picture (it has no image layers); drop it, or name another")
    features = features_for(args, question, settings) if args.img_type else None
    shape = features.shape if features is not None else None
    for folder, flag in ((args.model, "--model"), (args.answer_model, "--answer_model")):
        if folder:
            info = check_checkpoint(folder, shape, args.img_type, flag)
            sft_run.refuse_fresh_layers(info, shape, flag)
            check_vocabulary(load_tokenizer(args, folder), info)

    model = T5ForMultimodalGeneration.from_pretrained(args.model, patch_size=shape).to(args.device)
    if model.config.patch_size is not None and features is None:
        raise UserError(f"--img_type: {args.model} reads pictures; name the kind of features it was trained with")
    written = ask(model, load_tokenizer(args, args.model), question, features, settings, None)
    if not settings.prompt_format.endswith("-A"):
        print0(f"Rationale: {written}")
    if args.lora:
        model = load_adapter(model, Path(args.lora), "--lora").to(args.device)
    elif args.answer_model:
        model = T5ForMultimodalGeneration.from_pretrained(args.answer_model, patch_size=shape).to(args.device)
    if answering:
        tokenizer = load_tokenizer(args, args.answer_model, args.model)
        written = ask(model, tokenizer, question, features, answer_settings, written)
    if answering or "A" in settings.prompt_format.split("-")[1]:
        choices, options = question.problem["choices"], (answer_settings or settings).options
        letter = extract_answer(written, len(choices), options)
        named = letter and choices[option_letters(question.problem, options).index(letter)]
        print0(f"Answer: ({letter}) {named}" if letter else f"Answer: none; the model wrote {written!r}")
    else:
        print0("Answer: none asked for; --lora or --answer_model answers")
    if question.of_data:
        letter = answer_letter(question.problem, settings.options, question.qid)
        print0(f"Gold: ({letter}) {question.problem['choices'][question.problem['answer']]}")


if __name__ == "__main__":
    run(main)
