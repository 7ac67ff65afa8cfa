"""The demo's data set, tokenizer and tiny T5: right, solvable from what is shown, and the same bytes every time."""

import argparse
import json
import math
import re
import shutil
from collections import Counter, defaultdict
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from ares import data_folder as ares_problems
from ares import files, intervals
from ares.cli import UserError
from ares.sentences import split_text
from demo import distill, experiments, make_data, make_model
from demo.pictures import COLORS, PICTURE_KINDS, REGIONS
from model import T5ForMultimodalGeneration
from teacher import handoff, reference, reply_files
from utils_prompt import build_train_pair

SIZES = {"train": 100, "val": 20, "test": 40}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    make_data.main(["--output", str(output), "--seed", "3", *(f"--{key}={value}" for key, value in SIZES.items())])
    return output


@pytest.fixture(scope="module")
def problems(demo):
    return ares_problems.read_data_folder(demo / "data").problems


@pytest.fixture(scope="module")
def tokenizer_dir(demo):
    make_model.make_tokenizer(make_model.texts_of(demo), demo / "tokenizer")
    return demo / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_gives_the_same_bytes(demo, tmp_path):
    make_data.make_data(tmp_path, 3, **SIZES)
    for part in ("data", "images"):
        assert tree(tmp_path / part) == tree(demo / part)
    before = tree(tmp_path / "data")
    make_data.make_data(tmp_path, 4, **SIZES)  # replaces an earlier demo
    assert tree(tmp_path / "data") != before


def test_splits(demo, problems):
    splits = ares_problems.read_data_folder(demo / "data").splits
    assert {name: len(splits[name]) for name in SIZES} == SIZES
    assert sorted(splits["train"] + splits["val"] + splits["test"], key=int) == [*problems]
    assert splits["trainval"] == splits["train"] + splits["val"]
    for name, (source, _) in make_data.MINIS.items():
        assert splits[name] and set(splits[name]) <= set(splits[source])
    assert all(problems[qid]["split"] == name for name in SIZES for qid in splits[name])
    skills = {name: {problems[qid]["category"] for qid in splits[name]} for name in SIZES}
    assert skills["train"] == skills["val"] == skills["test"]


def test_questions_differ_and_their_answers_are_balanced():
    """No question twice across all splits: other words, another set of choices, or another picture."""
    drawn = make_data.draw_questions(list(make_data.KINDS), 580, seed=1)
    assert len({make_data.identity(question) for _, question in drawn}) == 580
    make_data.place_answers(drawn, Random(0))
    places = Counter((len(question.choices), question.answer) for _, question in drawn)
    for count in (2, 3, 4):
        shares = [places[count, position] / sum(places[count, p] for p in range(count)) for position in range(count)]
        assert max(shares) - min(shares) < 0.1, (count, shares)


def test_it_covers_what_scienceqa_covers(problems):
    everything = problems.values()
    assert {p["subject"] for p in everything} == {"natural science", "social science", "language science"}
    assert {len(problem["choices"]) for problem in everything} == {2, 3, 4, 5}
    assert {bool(problem["hint"]) for problem in everything} == {True, False}
    grades = [int(problem["grade"].removeprefix("grade")) for problem in everything]
    assert min(grades) == 1 and 9 <= max(grades) <= 12
    texts = " ".join(problem[part] for problem in everything for part in ("hint", "question", "solution", "lecture"))
    assert "Mrs." in texts and "a.m." in texts and "5.5" in texts and "\n" in texts
    assert 300 < len({word.lower() for word in re.findall(r"[^\W\d_]+", texts)}) < 600


def test_rationales_reason_and_end_by_naming_the_answer(problems):
    for qid, problem in problems.items():
        sentences = split_text(problem["solution"].replace("\n", " "))
        assert 2 <= len(sentences) <= 5, (qid, sentences)
        gold = problem["choices"][problem["answer"]]
        others = [choice for index, choice in enumerate(problem["choices"]) if index != problem["answer"]]
        assert named(gold, sentences[-1]), (qid, sentences)
        assert not any(named(other, sentences[-1]) and not named(other, gold) for other in others), (qid, sentences)


def named(choice, sentence):
    """Whether a sentence names a choice; "a car that moved 70 km in 2 hours" is named by "moved 70 km"."""
    core = re.sub(r"^an? \w+ that (moved .*) in \d hours$", r"\1", choice).rstrip(".")
    return re.search(rf"(?<![\w.]){re.escape(core)}(?!\w)", sentence) is not None


@pytest.mark.parametrize("kind", PICTURE_KINDS, ids=lambda kind: kind.__name__)
def test_pictures_are_needed(kind):
    """The words of a drawn question, caption included, go with different answers."""
    rng, golds = Random(0), defaultdict(Counter)
    for _ in range(400):
        question = kind(rng)
        text = (question.question, question.hint, question.caption, frozenset(question.choices))
        golds[text][question.choices[question.answer]] += 1
    often = [counts for counts in golds.values() if sum(counts.values()) >= 8]
    if often:
        assert sum(max(counts.values()) for counts in often) / sum(sum(counts.values()) for counts in often) < 0.75
    else:  # the choices differ too much to meet again: the words must not name the answer
        assert kind.__name__ == "larger_shape"


def pixels(image):
    """How many pixels have each colour."""
    return Counter({color: count for count, color in image.getcolors(maxcolors=image.width * image.height)})


def test_pictures_hold_the_answer():
    rng = Random(0)
    kinds = {kind.__name__: kind for kind in PICTURE_KINDS}

    def drawn(kind):
        question = kinds[kind](rng)
        return question, question.images.get("image.png"), question.choices[question.answer]

    for _ in range(30):
        _, image, gold = drawn("larger_shape")
        areas = pixels(image)
        assert max((color for color in COLORS if COLORS[color] in areas), key=lambda c: areas[COLORS[c]]) == gold

        _, image, gold = drawn("shaded_region")
        (left, top), _ = REGIONS[gold]
        assert image.getpixel((72 if left else 24, 72 if top else 24)) == (50, 50, 60)

        _, image, gold = drawn("magnets")
        assert gold == ("repel" if image.getpixel((30, 48)) == image.getpixel((66, 48)) else "attract")

        question, *_ = drawn("which_picture")
        color = COLORS[question.question.split()[-2]]
        shown = [question.images[f"choice_{index}.png"].getpixel((48, 52)) == color for index in range(2)]
        assert shown.index(True) == question.answer and sum(shown) == 1

        question, *_ = drawn("solutions")
        color = COLORS[question.question.split()[-2]]
        counts = [pixels(question.images[f"choice_{i}.png"])[color] for i in range(2)]
        assert counts.index(max(counts)) == question.answer

        _, image, gold = drawn("thermometer")
        level = float(gold.removesuffix("°C"))
        assert pixels(image)[(220, 20, 20)] == pytest.approx(23 * (17 + 21 * (level - 5.5) / 10), rel=0.01)


def test_images_captions_and_name_map(demo, problems):
    captions = ares_problems.load_captions(demo / "data" / "captions.json")
    name_map = ares_problems.load_name_map(demo / "data" / "name_map.json")
    shown = [qid for qid in problems if ares_problems.question_images(demo / "images", qid)]
    assert [*captions] == [*name_map] == shown and [*name_map.values()] == [*range(len(shown))]
    names = {qid: [path.name for path in ares_problems.question_images(demo / "images", qid)] for qid in shown}
    choice_only = [qid for qid in shown if names[qid] == ["choice_0.png", "choice_1.png"]]
    assert choice_only and ["image.png", "choice_0.png", "choice_1.png"] in names.values()
    for qid, problem in problems.items():  # as in ScienceQA: null where there are choice images only
        assert problem["image"] == ("image.png" if qid in shown and qid not in choice_only else None)
    for qid in shown:
        gold = problems[qid]["choices"][problems[qid]["answer"]]
        assert gold.lower() not in captions[qid].lower()


def test_mistakes(tmp_path):
    new = f"--output {tmp_path}/new"
    (tmp_path / "data" / "scienceqa").mkdir(parents=True)
    for script, flags, words in (
        (make_data, f"--output {tmp_path}", "not a demo's"),
        (make_data, f"{new} --test 0", "--test: 0 questions"),
        (make_data, f"{new} --train 1998 --val=1 --test=1 --kinds genes", "genes has no 2000 different"),
        (make_model, f"--data {tmp_path} --tokenizer t --output m", "--data: .*problems.json does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            script.main(flags.split())
        assert {path.name for path in tmp_path.iterdir()} <= {"data", "new"}


def test_tokenizer_is_of_t5s_kind(tokenizer, t5_tokenizer):
    assert type(tokenizer) is type(t5_tokenizer)
    for name in ("pad_token", "eos_token", "unk_token", "pad_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(tokenizer, name) == getattr(t5_tokenizer, name)
    size = len(tokenizer)
    assert size <= 1000
    assert [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(100)] == [
        size - 1 - i for i in range(100)
    ]
    assert tokenizer("A sentence.").input_ids[-1] == 1
    for text in ("So, it is Dr. Reed (B).", "at 5.5°C, 9 a.m. ", "two\nlines  and\ttabs", 'He said: "Look!"'):
        ours, theirs = (each.decode(each(text).input_ids) for each in (tokenizer, t5_tokenizer))
        assert ours == theirs
    for each in (tokenizer, t5_tokenizer):  # backslash-n leaves a stray n
        pieces = each.convert_ids_to_tokens(each("two hours.\\nLook at it").input_ids)
        place = pieces.index("<unk>")
        assert pieces[place - 1] == "." and pieces[place + 1].startswith("n")
        assert each.decode(each("hours.\\nLook").input_ids, skip_special_tokens=True) == "hours.nLook"


def test_pieces_are_words_or_punctuation(tokenizer, problems):
    for piece in tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        assert re.fullmatch(r"▁?([^\W_]+|[^\w\s]|_)|▁", piece), piece
    texts = [problem["solution"] for problem in problems.values()]
    for text in texts:
        words = " ".join(text.split())
        assert tokenizer.decode(tokenizer(words).input_ids, skip_special_tokens=True) == words
    counts = Counter(word for text in texts for word in re.findall(r"(?<!\S)[^\W\d_]+", text))
    frequent = [word for word, count in counts.items() if count >= 5]
    whole = [word for word in frequent if len(tokenizer.tokenize(word)) == 1]
    assert len(whole) >= 0.97 * len(frequent)


def test_tokenizer_bytes_and_training(demo, tokenizer_dir, tmp_path):
    make_model.make_tokenizer(make_model.texts_of(demo), tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tokenizer_dir)
    with pytest.raises(UserError, match="--vocab_size: 150"):
        make_model.make_tokenizer(["a text"], tmp_path / "small", vocab_size=150)
    words = Counter({"▁magnet": 40, "▁magnets": 40, "▁mag": 1, "s": 3})
    pieces = dict(make_model.train_unigram(words, 200))
    assert max(pieces, key=pieces.get) in ("▁magnet", "▁magnets")  # whole words
    assert sum(math.exp(score) for score in pieces.values()) == pytest.approx(1, abs=1e-3)


def test_tiny_t5(tokenizer_dir, tokenizer, problems, tmp_path):
    state = torch.get_rng_state()
    folders = [
        make_model.build_t5(tokenizer_dir, tmp_path / f"{number}", d_model=32, seed=seed)
        for number, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(state, torch.get_rng_state())
    one, same, other = (tree(folder) for folder in folders)
    assert one == same and one["model.safetensors"] != other["model.safetensors"]

    model = T5ForMultimodalGeneration.from_pretrained(folders[0])
    assert not model.config.tie_word_embeddings and model.config.feed_forward_proj == "gated-gelu"
    assert model.lm_head.weight is not model.shared.weight
    assert model.encoder.embed_tokens.weight is model.shared.weight is model.decoder.embed_tokens.weight
    args = argparse.Namespace(prompt_format="QCM-E", use_caption=False, options=list("ABCDE"))
    prompts, targets = zip(*(build_train_pair(problems, qid, args) for qid in list(problems)[:8]), strict=True)
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt")
    labels = tokenizer(list(targets), padding=True, return_tensors="pt").input_ids
    loss = model(**batch, labels=labels.masked_fill(labels == 0, -100)).loss.item()
    assert loss == pytest.approx(math.log(len(tokenizer)), abs=0.1)


def test_tiny_t5_for_the_real_tokenizer(t5_tokenizer_dir, tmp_path):
    folder = make_model.build_t5(t5_tokenizer_dir, tmp_path / "t5", d_model=16, heads=2, vocab_size=32128)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 32128
    for tokenizer, how, words in (
        (t5_tokenizer_dir, {"vocab_size": 500}, "--vocab_size: 500"),
        (t5_tokenizer_dir, {"heads": 5}, "--heads: 5"),
        (tmp_path, {}, "holds no tokenizer"),
    ):
        with pytest.raises(UserError, match=words):
            make_model.build_t5(tokenizer, tmp_path / "other", **how)


def test_tables_of_experiments_pair_questions(tmp_path, capsys):
    """One run of each recipe; then all, where two RL seeds share their questions and count as one value."""
    costs = {"unfinished": 1.0, "repeated": 0.0, "no_conclusion": 5.0, "words": 21.0}

    def write(arm: str, seed: int, rl_seed: int, gains: list[float]) -> None:
        fixed = {"concludes": [0, 100, 0, 100], "covered": [50.0] * 4}
        values = {"start": {"score": [0.5] * 4, **fixed}, "RL": {"score": [0.5 + gain for gain in gains], **fixed}}
        folder = tmp_path / f"seed{seed}/{arm}-{rl_seed}"
        files.write_json(folder / "table.json", {"rationales": {"start": {}, "RL": costs}, "by_question": values})
        files.write_json(folder / "stages.json", {"stages": {"rl": {"cpu_seconds": 100.0 + 20 * rl_seed}}})

    for rl_seed, swing in ((0, 0.2), (11, -0.2)):
        for seed, gain in ((0, 0.1), (1, 0.3)):
            # one name is the beginning of the other
            write("warm-5e-5-1e-4", seed, rl_seed, [gain - swing, gain + swing, gain - swing, gain + swing])
            write("warm_vf-5e-5-1e-4", seed, rl_seed, [gain + 0.05] * 4)
    write("rloo-5e-5-1e-4", 0, 0, [0.0] * 4)
    experiments.write_table(tmp_path)
    text = (tmp_path / "recipes.md").read_text()
    assert text in capsys.readouterr().out
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
              for part in text.split("\n\n")]  # fmt: skip
    one, many = (table[2:] for table in tables)
    assert [row[1] for row in one] == ["1"] * 3 and [row[1] for row in many] == ["4", "4"]
    assert one[0][2].startswith("+0.100 [-0.1") and one[1][2] == "+0.150 [+0.150, +0.150]"
    assert one[0][3] == "+0.0 [+0.0, +0.0], not distinguishable" and one[0][5:] == ["1.0", "0.0", "5.0", "21.0", "100"]
    # the swing of the RL seeds cancels in each question's mean: values 0.1 (4 times) and 0.3 (4 times)
    low, high = intervals.mean_interval([0.1] * 4 + [0.3] * 4)
    assert many[0][2] == f"+0.200 [+{low:.3f}, +{high:.3f}]"
    assert many[0][9:] == ["210", "+0.100 to +0.300", ""]
    assert many[1][9:] == ["210", "+0.150 to +0.350", "+0.050 [+0.050, +0.050]"]


def test_tables_of_the_distilled_teacher(demo, problems, tmp_path, capsys):
    qids = list(problems)[:6]

    def score_round(folder, scorer):
        for qid in qids:
            place = handoff.question_dir(folder, 0, 0, qid)
            sentences = split_text(problems[qid]["solution"])
            handoff.write_rationale(place, sentences)
            text = json.dumps({"scores": scorer(problems[qid], sentences)})
            reply_files.write_reply(place, text, {}, reply_files.reading("score", text, sentences))

    gold = [reference.score_sentences(problems[qid], split_text(problems[qid]["solution"])) for qid in qids]
    mean = sum(map(sum, gold)) / sum(map(len, gold))
    for seed, gain in ((0, 0.1), (1, 0.3)):
        world = tmp_path / f"seed{seed}"
        shutil.copytree(demo / "data", world / "data")
        for arm, better in (("first", 0), ("reference", gain), ("model", gain / 2)):
            values = {"start": {"score": [0.2] * 4}, "RL": {"score": [0.4 + better] * 4}}
            files.write_json(world / arm / "table.json", {"by_question": values})
            for number in range(2):
                fooled = arm == "model" and number == 1
                scorer = (lambda problem, texts: [1.0] * len(texts)) if fooled else reference.score_sentences
                score_round(world / arm / f"rl/questions_round{number}", scorer)
        ours = {"mean_difference": 0.1, "rank_correlation": 0.5, "within_0.1": 0.75, "sentences": 9}
        metrics = {"way": 0.6, "agreement": {"all": {"reward model": ours}}}
        files.write_json(world / "reward_model/metrics.json", metrics)
    args = distill.parse_args(["--rounds", "2", "--seeds", "0", "1"])
    found = distill.figures(args, {seed: tmp_path / f"seed{seed}" for seed in (0, 1)})
    assert found["score"]["first"] == pytest.approx([0.4, 0.4])
    assert found["differences"]["reference - first"]["difference"] == pytest.approx(0.2)
    assert found["differences"]["model - reference"]["difference"] == pytest.approx(-0.1)
    second = found["rounds"]["model"][0][1]
    assert second["given"] == 1.0 and second["reference"] == pytest.approx(mean)
    assert found["rounds"]["reference"][1][1]["given"] == pytest.approx(mean)
    text = distill.markdown(distill.tables_of(found), [])
    assert "| model - first | +0.100 [+0.0" in text and "| round 2 | " in text and "1.000 ± 0.000" in text
    json.dumps(found)
