"""Rollouts on disk: what is stored, that it is what the models say, and that nothing depends on who samples it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ares import cli, files
from ares.cli import UserError
from ares.decoding import action_mask
from ares.sentences import sentence_columns
from rl import collection, rollouts
from teacher import handoff
from tests.disk import disk_calls
from tests.rl import rl_tools
from tests.rl.rl_tools import random_rollouts


def same(a: rollouts.Rollouts, b: rollouts.Rollouts) -> bool:
    lists = all(getattr(a, name) == getattr(b, name) for name in ("qids", "action", "rank"))
    tensors = ("lengths", "sentence_counts", "columns", *rollouts.FIELDS)
    return lists and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_a_file_gives_back_what_was_saved_and_rows_can_be_picked(tmp_path):
    whole = random_rollouts(7)
    whole.save(tmp_path / "batch.safetensors")
    assert same(rollouts.Rollouts.load(tmp_path / "batch.safetensors"), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["batch.safetensors"]
    picked = whole.select([5, 0, 3])
    assert [picked.ids(i) for i in range(3)] == [whole.ids(i) for i in (5, 0, 3)]
    assert [picked.row_columns(i) for i in range(3)] == [whole.row_columns(i) for i in (5, 0, 3)]
    assert same(rollouts.Rollouts.concatenate([whole.select([0, 1, 2]), whole.select([3, 4, 5, 6])]), whole)
    assert len(whole.select([])) == 0


def test_stored_rows_are_those_of_the_sampled_ids(t5_tokenizer):
    """The last token of a rationale that is unfinished, or cut at output_len in a word or at a full stop, ends its
    last sentence."""
    texts = ["It is so. It ends.", "It is so. It does not", "Cut here. And here the", "Cut at. The stop.", "So", ""]
    ids = [[0, *t5_tokenizer(text).input_ids] for text in texts]
    ids = [row[:-1] if text.startswith("Cut") else row for row, text in zip(ids, texts, strict=True)]
    actions = torch.tensor([row + [0] * (12 - len(row)) for row in ids])
    sampled = {"actions": actions} | {
        name: torch.arange(66).view(6, 11) + 100.0 * place for place, name in enumerate(rollouts.FIELDS[1:])
    }
    rows = rollouts.to_rollouts(sampled, [str(i) for i in range(3)], 2, rank=0, tokenizer=t5_tokenizer)
    assert [rows.ids(row) for row in range(6)] == ids
    columns = [rows.row_columns(row) for row in range(6)]
    assert columns == [sentence_columns(row, t5_tokenizer) for row in actions]
    assert [row[-1] for row in columns[1:4]] == [len(row) - 1 for row in ids[1:4]]
    assert [len(row) for row in columns] == [2, 2, 2, 2, 1, 0]
    for place, name in enumerate(rollouts.FIELDS[1:]):
        found = rows.pad(getattr(rows, name), range(6))[0].tolist()
        for row, numbers in enumerate(found):
            n = len(ids[row]) - 1
            assert numbers[:n] == [100.0 * place + 11 * row + t for t in range(n)]


def test_padding_puts_each_row_where_it_belongs():
    whole = random_rollouts(6)
    actions, mask = whole.actions([4, 1])
    assert actions.shape[1] == mask.shape[1] + 1 and (actions[:, 0] == 0).all()
    for i, row in enumerate((4, 1)):
        assert actions[i][actions[i] != 0].tolist() == whole.ids(row)[1:]
        assert torch.equal(mask[i], action_mask(actions)[i])
    values, _ = whole.pad(whole.values, [4, 1])
    begin = int(whole.offsets[1])
    assert torch.equal(values[1][mask[1]], whole.values[begin : begin + int(whole.lengths[1])])
    assert (values[~mask] == 0).all()
    last, mask = whole.pad(whole.values, [5, int(whole.lengths.argmax())])
    assert torch.equal(last[0][mask[0]], whole.values[-int(whole.lengths[5]) :])


def test_batches_hold_every_question_once_by_falling_length():
    lengths = {f"q{i}": (i * 7) % 11 for i in range(23)}
    batches = rollouts.plan_batches(lengths, 4)
    flat = [qid for batch in batches for qid in batch]
    assert sorted(flat) == sorted(lengths) and [len(batch) for batch in batches] == [4] * 5 + [3]
    assert [lengths[qid] for qid in flat] == sorted(lengths.values(), reverse=True)


def test_a_small_split_is_shared_out_and_the_plan_kept_on_another_number_of_processes(tmp_path, monkeypatch):
    """64 questions at --bs 64 would leave all but one process idle."""
    prompts = SimpleNamespace(lengths={f"q{i}": i for i in range(64)}, fingerprint=lambda: "same")
    monkeypatch.setenv("WORLD_SIZE", "4")
    store = rollouts.RolloutStore(tmp_path, 0)
    plan = store.plan(prompts, 64, 2)
    assert [len(batch) for batch in plan] == [16] * 4
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert store.plan(prompts, 64, 2) == plan
    assert [len(batch) for batch in rollouts.RolloutStore(tmp_path, 1).plan(prompts, 24, 2)] == [24, 24, 16]
    with pytest.raises(UserError, match="not those of the rollouts"):
        store.plan(prompts, 64, 3)  # another k
    with pytest.raises(UserError, match="not those of the rollouts"):
        store.plan(SimpleNamespace(lengths=prompts.lengths, fingerprint=lambda: "other"), 64, 2)


def test_seeds_differ_and_stay():
    seeds = {rollouts.seed_for(42, "sampling", r, b) for r in range(3) for b in range(50)}
    assert len(seeds) == 150 and all(0 <= seed < 2**63 for seed in seeds)
    assert rollouts.seed_for(42, "sampling", 0, 0) == 8497325028842281635


# -- collecting ------------------------------------------------------------------------------------------


LOST = {  # what a kill between a batch and its export leaves of a rationale, then what a power cut leaves
    "absent": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:25]),
}


@pytest.mark.parametrize("lost_by_power, damage", [(name != "absent", how) for name, how in LOST.items()], ids=LOST)
def test_collect_goes_on_where_it_was_killed(lost_by_power, damage, tmp_path, t5_tokenizer, capsys):
    store = rollouts.RolloutStore(tmp_path, 0)
    batches = [["a", "b"], ["c", "d"], ["e"]]
    made = []

    def sample(number, qids):
        made.append(number)
        if len(made) == 2:
            raise KeyboardInterrupt
        ids = t5_tokenizer("The sun is a star. It is hot.")["input_ids"]
        return rollouts.to_rollouts(
            {
                "actions": torch.tensor([[0, *ids]] * len(qids)),
                **{name: torch.zeros(len(qids), len(ids)) for name in rollouts.FIELDS[1:]},
            },
            qids, 1, 0, t5_tokenizer,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        collection.collect(store, batches, sample, t5_tokenizer)
    assert not handoff.exported(store.questions) and not store.collected_file.exists()
    lost = handoff.question_dir(store.questions, 0, 0, "b") / handoff.RATIONALE
    text = lost.read_bytes()
    damage(lost)
    with disk_calls() as calls:
        collection.collect(store, batches, sample, t5_tokenizer)
    assert made == [0, 1, 1, 2] and lost.read_bytes() == text
    assert (str(lost) in capsys.readouterr().err) == lost_by_power
    # one flush of all rationales, before the signal, and one of each file that took hours or ends a stage
    assert calls.count(handoff.RATIONALE) == 4 and calls.count("flush all") == 1
    assert calls[calls.index("flush all") :][:3] == ["flush all", "flush", handoff.EXPORTED]
    assert calls.count("flush") == 2 + 2  # two batches, the signal, collected.json
    assert handoff.exported(store.questions) and len(store.load()) == 5
    assert files.read_json(store.collected_file, "test") == {"batches": 3, "samples": 5, "sentences": 10}


def test_the_export_is_signalled_once_every_process_has_flushed_its_part(tmp_path, t5_tokenizer, monkeypatch):
    store, ids = rollouts.RolloutStore(tmp_path, 0), t5_tokenizer("Ice is cold.")["input_ids"]
    zeros = {name: torch.zeros(1, len(ids)) for name in rollouts.FIELDS[1:]}
    actions = {"actions": torch.tensor([[0, *ids]]), **zeros}
    waits = []

    def collect(rank):
        def sample(number, qids):
            return rollouts.to_rollouts(actions, qids, 1, rank, t5_tokenizer)

        def wait(self, path, poll_seconds):  # in place of sleeping: the file's absence ends the process
            waits.append((rank, path.name))
            if not path.exists():
                raise FileNotFoundError(path)

        monkeypatch.setattr(cli, "rank", lambda: rank)
        monkeypatch.setattr(rollouts.RolloutStore, "wait_for", wait)
        collection.collect(store, [["a"], ["b"]], sample, t5_tokenizer)

    monkeypatch.setattr(cli, "world_size", lambda: 2)
    with pytest.raises(FileNotFoundError, match="collected"), disk_calls() as calls:
        collect(1)
    assert calls[-2:] == ["flush all", "exported_p1"]
    store.exported_file(1).unlink()  # as if killed before it: its rationale is there
    with pytest.raises(FileNotFoundError, match="exported_p1"):
        collect(0)
    assert not handoff.exported(store.questions)
    with pytest.raises(FileNotFoundError, match="collected"):
        collect(1)
    collect(0)
    assert handoff.exported(store.questions) and waits[-1] == (0, "exported_p1")


# -- replies ---------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    """A store of ten rows, two without a sentence, with their rationales exported."""
    rows = random_rollouts(10)
    rows.sentence_counts[:] = torch.tensor([2, 0, 1, 3, 2, 0, 1, 1, 2, 1])
    rows.columns = torch.ones(13, dtype=torch.int32)
    rows.__post_init__()
    store = rollouts.RolloutStore(tmp_path, 0)
    for row in rollouts.rows_with_sentences(rows):
        folder = rollouts.question_folder(rows, row, store.questions)
        handoff.write_rationale(folder, [f"Sentence {i}." for i in range(int(rows.sentence_counts[row]))])
    return store, rows


def test_scores_are_read_and_published_once(exported):
    store, rows = exported
    rl_tools.answer(store.questions, scorer=lambda sentence: 0.3)
    decision = rollouts.read_feedback(store, rows, max_dropped=0.0)
    with disk_calls() as calls:  # what holds the result already is not written again
        assert rollouts.read_feedback(store, rows, max_dropped=0.0) == decision
    assert calls == ["flush", store.scores_file.name]
    assert decision == files.read_json(store.scores_file, "test") and decision["dropped"] == {}
    kept, scores = rollouts.scored(rows, decision)
    assert len(kept) == 10 and [len(row) for row in scores] == rows.sentence_counts.tolist()
    assert {value for row in scores for value in row} == {0.3}


def test_lost_replies_are_dropped_and_counted_by_reason(exported, capsys):
    store, rows = exported
    keys = rows.keys()
    missing, spoilt = (keys[0], keys[3])
    rl_tools.answer(
        store.questions,
        skip=lambda item: f"{item.action}/{item.qid}" == missing,
        spoil=lambda item: f"{item.action}/{item.qid}" == spoilt,
    )
    with pytest.raises(UserError, match="2 of 8 replies are lost.*--max_dropped"):
        rollouts.read_feedback(store, rows, max_dropped=0.2)
    assert not store.scores_file.exists()  # nothing is decided: the replies can be mended
    decision = rollouts.read_feedback(store, rows, max_dropped=0.25)
    assert decision["dropped"] == {"no_reply": [missing], "placeholder": [spoilt]}
    kept, scores = rollouts.scored(rows, decision)
    assert kept.keys() == [key for key in keys if key not in (missing, spoilt)] and len(scores) == 8
    assert "2 of 8 samples dropped" in capsys.readouterr().err


def test_no_reply_at_all_is_an_error_whatever_is_allowed(exported):
    store, rows = exported
    with pytest.raises(UserError, match="not one of 8 replies"):
        rollouts.read_feedback(store, rows, max_dropped=1.0)
