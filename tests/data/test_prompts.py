"""The student's prompts against what the released code computed on real questions (fixtures/prompts.json)."""

from __future__ import annotations

import argparse
import json
from collections import Counter

import pytest

import utils_data
import utils_prompt
from ares.cli import PROMPT_FORMATS, UserError


@pytest.fixture(scope="module")
def released(fixtures):
    return json.loads((fixtures / "prompts.json").read_text(encoding="utf-8"))


def flags(prompt_format="QCM-E", use_caption=False, options="ABCDE", **more):
    return argparse.Namespace(prompt_format=prompt_format, use_caption=use_caption, options=list(options), **more)


def problem(**changes):
    usual = {"question": "Q?", "choices": ["a", "b"], "answer": 0, "hint": "", "lecture": "", "solution": "S."}
    return {**usual, **changes}


def pair(changes, curr_le_data=None, **args):
    return utils_prompt.build_train_pair({"7": problem(**changes)}, "7", flags(**args), curr_le_data)


def test_every_released_prompt_and_target(released):
    cases = released["cases"]
    assert len(cases) == 966
    seen = Counter((case["prompt_format"], case["use_caption"]) for case in cases)
    assert {name for name, _ in seen} == {"QCM-A", "QCM-E", "QCM-LE", "QCM-LEA", "QCM-ALE", "QCMG-A"}
    assert all(count >= 65 for count in seen.values()) and len(seen) == 12
    for case in cases:
        args = flags(case["prompt_format"], case["use_caption"], released["options"])
        prompt, target = utils_prompt.build_train_pair(released["problems"], case["pid"], args, case["curr_le_data"])
        made = (prompt, target, utils_prompt.normalize(prompt), utils_prompt.normalize(target))
        assert made == (case["input"], case["target"], case["input_norm"], case["target_norm"]), case["pid"]


def test_released_token_ids_after_truncation(released, t5_tokenizer):
    """Ids equal the released ones; its pads were targets with label 0 (a bug), ours are masked by -100."""
    truncated = 0
    for case in released["tokens"]:
        args = flags(case["prompt_format"], case["use_caption"], released["options"])
        args.input_len, args.output_len = case["source_len"], case["target_len"]
        dataset = utils_data.RationaleDataset(released["problems"], [case["pid"]], t5_tokenizer, args)
        assert dataset[0]["input_ids"] == case["input_ids"]
        assert dataset[0]["labels"] == case["labels"]
        assert dataset[0]["input_ids"][-1] == t5_tokenizer.eos_token_id
        truncated += case["untruncated_len"] > case["source_len"]
    assert len(released["tokens"]) == 42 and truncated == 6

    assert {case["label_pad_value"] for case in released["tokens"]} == {0}
    short, long = sorted((case["labels"] for case in released["tokens"]), key=len)[:: len(released["tokens"]) - 1]
    items = [{"qid": "1", "input_ids": [5, 1], "labels": labels} for labels in (short, long)]
    labels = utils_data.Collator(t5_tokenizer.pad_token_id)(items)["labels"]
    assert labels[0].tolist() == short + [-100] * (len(long) - len(short)) and labels[1].tolist() == long


def test_given_rationale_empty_is_not_the_gold_one():
    """A model that wrote nothing must not be handed the gold solution."""
    args = {"prompt_format": "QCMG-A"}
    assert "Gold." in pair({"solution": "Gold."}, **args)[0]
    assert "Gold." not in pair({"solution": "Gold."}, curr_le_data="", **args)[0]


def test_every_format_of_the_flag_is_built_and_others_are_refused():
    for prompt_format in PROMPT_FORMATS:
        prompt, target = pair({"lecture": "L.", "answer": 1}, prompt_format=prompt_format)
        assert prompt.endswith("Answer:" if prompt_format.endswith("-A") else "Solution:")
        assert ("Solution: L. S." in prompt) == prompt_format.startswith("QCMG")
        assert ("(B)" in target) == ("A" in prompt_format.split("-")[1])
        assert ("S." in target) == ("E" in prompt_format.split("-")[1])
    with pytest.raises(UserError, match="'QCX-E' is not one of QCM-A"):
        pair({}, prompt_format="QCX-E")


def test_options_are_the_letters():
    assert pair({"answer": 1}, options="XY")[0].count("(X) a (Y) b") == 1
    assert pair({"answer": 1}, options="XY", prompt_format="QCM-A")[1] == "The answer is (Y)."
    assert utils_prompt.answer_letter(problem(answer=1), ["ABCDE"]) == "B"  # as written by `--options ABCDE`
    with pytest.raises(UserError, match=r"--options: question 7 has 3 choices but .* 2 letters"):
        pair({"choices": ["a", "b", "c"]}, options="AB")


def test_a_format_without_the_rationale_says_so_once(capsys):
    given = {"train_le": None, "eval_le": "e.json", "test_le": "t.json"}
    utils_data.check_prompt_flags(flags("QCM-A", **given))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "QCM-A" in lines[0] and "--eval_le and --test_le" in lines[0] and "QCMG-A" in lines[0]
    utils_data.check_prompt_flags(flags("QCMG-A", **given))
    assert capsys.readouterr() == ("", "")
    utils_data.check_prompt_flags(flags("QCMG-A", **{**given, "test_le": None}))
    assert "gold solution into the prompts of the test split" in capsys.readouterr().err


def test_dataset_puts_each_questions_rationale(t5_tokenizer):
    problems = {"7": problem(), "8": problem(question="R?")}
    args = flags("QCMG-A", input_len=64, output_len=16)
    le = {"8": "eight", "7": "seven"}
    dataset = utils_data.RationaleDataset(problems, ["7", "8"], t5_tokenizer, args, le)
    assert [prompt.split()[-2] for prompt in dataset.prompts] == ["seven", "eight"]
    assert dataset.targets == ["The answer is (A)."] * 2 and len(dataset) == 2
