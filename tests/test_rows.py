"""Tokens -> rows -> loss: packing loses nothing, no document sees another, and the loss is the model's own."""

import os
import shutil
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import arguments, assert_says, error_of, planned

import train_sft_dolores as sft
from train_sft_dolores import IGNORE

sft.load_libraries()

property_test = settings(deadline=None, database=None, max_examples=150)


# ---- packing ----


@property_test
@given(
    st.integers(16, 3000).flatmap(
        lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))
    ),
    st.integers(0, 9),
)
def test_pack_is_a_partition(case, seed):
    capacity, lengths = case
    lengths = np.array(lengths, np.int64)
    rows = sft.pack(lengths, capacity, seed)
    assert sorted(chain(*(row.tolist() for row in rows))) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= capacity for row in rows)
    again = sft.pack(lengths, capacity, seed)
    assert [row.tolist() for row in rows] == [row.tolist() for row in again]


def test_pack_exact():
    assert sft.pack(np.array([], np.int64), 16, 0) == []
    rows = sft.pack(np.array([6, 3, 10, 7, 4]), 10, 0)
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 4], [1, 3], [2]]
    # The 3 goes beside the 7, where it fits exactly, and not into the space that the two 2s need.
    rows = sft.pack(np.array([7, 6, 3, 2, 2]), 10, 0)
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 2], [1, 3, 4]]


def test_rows_are_full():
    """Within 1 % of the smallest possible number of rows, for typical lengths of conversations."""
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 20_000).astype(np.int64).clip(1, 2048)
    assert len(sft.pack(lengths, 2048, 42)) <= 1.01 * np.ceil(lengths.sum() / 2048)


def test_the_seed_shuffles_equal_lengths():
    one, two = ({frozenset(row.tolist()) for row in sft.pack(np.full(100, 40), 100, seed)} for seed in (1, 2))
    assert one != two and len(one) == len(two) == 50


# ---- hold-out ----


@property_test
@given(
    st.lists(st.integers(0, 2**62), min_size=1, max_size=40),
    st.floats(0, 0.5),
    st.integers(0, 2**32 - 1),
    st.randoms(use_true_random=False),
)
def test_hold_out(conversations, fraction, seed, random):
    copies = [digest for digest in conversations for _ in range(random.randint(1, 3))]
    random.shuffle(copies)
    digests, distinct = np.array(copies), len(set(copies))
    held_out = sft.hold_out(digests, fraction, seed)
    assert held_out.dtype == bool and held_out.shape == digests.shape
    inside, outside = set(digests[held_out].tolist()), set(digests[~held_out].tolist())
    assert not inside & outside and outside
    assert len(inside) == (min(max(1, round(fraction * distinct)), distinct - 1) if fraction else 0)
    # The same conversations are chosen whatever their order and number of copies.
    assert (sft.hold_out(digests, fraction, seed) == held_out).all()
    assert set(np.unique(digests)[sft.hold_out(np.unique(digests), fraction, seed)].tolist()) == inside


def test_another_seed_holds_out_other_conversations():
    one, two = (sft.hold_out(np.arange(1000), 0.1, seed) for seed in (1, 2))
    assert one.sum() == two.sum() == 100 and (one & two).sum() < 50
    assert sft.hold_out(np.arange(10_000), 0.1, 1).sum() == 500  # an evaluation does not grow with the data


# ---- files -> rows ----


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


class Counting(sft.Encoder):
    """The encoder; it counts the conversations that it is given."""

    encoded = 0

    def __call__(self, conversations):
        self.encoded += len(conversations)
        return super().__call__(conversations)


@pytest.fixture
def encode(smollm2_tokenizer) -> Counting:
    return Counting(smollm2_tokenizer, sft.chat_format("dolores", smollm2_tokenizer))


def dialogue(*contents) -> str:
    return "<|endoftext|>\n" + "".join(f"<|{'assistant' if i % 2 else 'user'}|>\n{c}\n" for i, c in enumerate(contents))


def corpus() -> str:
    """40 conversations; the i-th has i % 5 + 1 exchanges and appears twice if i is a multiple of 4."""
    text = ""
    for i in range(40):
        turns = (f"{who}{i} {j} " + "oui " * (i % 7) for j in range(i % 5 + 1) for who in "qa")
        text += dialogue(*turns) * (1 if i % 4 else 2)
    return text


class Known(NamedTuple):
    """A sample as Python's own types, to be compared and sorted."""

    ids: list[int]
    labels: list[int]
    digest: int
    line: int


def samples_of(rows) -> list[Known]:
    """All samples of these rows, sorted."""
    columns = ("input_ids", "labels", "digest", "line")
    samples = (zip(*(rows[i][column] for column in columns), strict=True) for i in range(len(rows)))
    return sorted(Known(*(np.array(value).tolist() for value in sample)) for sample in chain(*samples))


def expected_samples(file, encode) -> list[Known]:
    conversations = list(sft.read_conversations([file], "chatml"))
    tokens = encode([c.turns for c in conversations])
    return sorted(
        Known(ids.tolist(), labels.tolist(), sft.digest(c.turns), c.line)
        for c, (ids, labels) in zip(conversations, tokens, strict=True)
    )


def digests(samples) -> set[int]:
    return {sample.digest for sample in samples}


def prepare(encode, *options) -> sft.Plan:
    """The plan of these flags; the training file is d unless they name others."""
    return planned(arguments("--train-files", "d", *options), encode)


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_each_conversation_is_in_one_row(cache, encode, packing):
    Path("d").write_text(corpus())
    plan = prepare(encode, "--max-length", 256, "--eval-fraction", 0.2, packing)
    train, held_out, counts = plan.train_rows, plan.eval_rows, plan.counts
    inside, outside = samples_of(train), samples_of(held_out)
    assert sorted(inside + outside) == expected_samples("d", encode) and len(inside + outside) == 50
    assert len(digests(outside)) == 8 and not digests(inside) & digests(outside)
    tokens = [sum(map(len, train[i]["input_ids"])) for i in range(len(train))]
    assert sum(map(len, train.longest()["input_ids"])) == max(tokens) <= 256
    assert counts["conversations"] == 50 and counts["held_out"] == len(outside) and counts["rows"] == len(train)
    assert counts["trained_on"] == len(inside) and counts["dropped"] == counts["skipped"] == 0
    assert counts["tokens"] == sum(tokens) and counts["fill"] == round(sum(tokens) / 256 / len(train), 4)
    assert counts["trained_tokens"] == sum(label != IGNORE for sample in inside for label in sample.labels)
    assert counts["steps_per_epoch"] == -(-len(train) // 32)
    if packing == "--packing":
        assert len(train) < len(inside) / 2
    else:
        assert len(train) == len(inside) and len(held_out) == len(outside)


def test_no_hold_out_and_eval_files(cache, encode):
    Path("d").write_text(corpus())
    Path("e").write_text(dialogue("q", "a"))
    plan = prepare(encode, "--eval-fraction", 0)
    assert samples_of(plan.train_rows) == expected_samples("d", encode)
    assert plan.eval_rows is None and plan.counts["held_out"] == 0
    plan = prepare(encode, "--eval-files", "e")
    assert samples_of(plan.train_rows) == expected_samples("d", encode)
    assert samples_of(plan.eval_rows) == expected_samples("e", encode)


def test_what_is_evaluated_is_not_trained_on(cache, encode):
    """A file in both sets, and a copy in another file: both are held out, with a warning."""
    Path("d").write_text(corpus() + dialogue("q", "a"))
    Path("e").write_text(dialogue("q", "a") + dialogue("r", "b"))
    plan = prepare(encode, "--train-files", "d", "e", "--eval-files", "e")
    evaluated = expected_samples("e", encode)
    assert samples_of(plan.eval_rows) == evaluated
    expected = [sample for sample in expected_samples("d", encode) if sample.digest not in digests(evaluated)]
    assert samples_of(plan.train_rows) == expected
    # The copy in d is not trained on either; e is read once, and named once.
    counts = [plan.counts[name] for name in ("trained_on", "held_out", "copies", "conversations")]
    assert counts == [50, 2, 1, 53]
    assert sorted(finding.file for finding in plan.findings if finding.kind == "held out") == ["d", "e"]
    assert_says(error_of(prepare, encode, "--train-files", "e", "--eval-files", "d", "e"), "e", "--eval-files")


def test_parts_of_a_long_conversation_stay_on_one_side(cache, encode):
    long = (dialogue(*(f"{who}{i}.{j}" for j in range(30) for who in "qa")) for i in range(10))
    Path("d").write_text("".join(long))
    plan = prepare(encode, "--max-length", 64, "--eval-fraction", 0.3)
    inside, outside = samples_of(plan.train_rows), samples_of(plan.eval_rows)
    assert len(digests(outside)) == 3 and len(digests(inside)) == 7 and len(inside) > 70
    assert not digests(inside) & digests(outside)
    labels = list(chain(*(sample.labels for sample in inside + outside)))
    assert labels.count(encode.special_ids["<|im_end|>"]) == 300  # every answer of every conversation, once


@pytest.mark.parametrize("evaluated, trained", [("", "d"), ("e", "d"), ("e d", "e x")])
def test_every_conversation_is_counted_once(cache, encode, evaluated, trained):
    """Read = trained on + held out + dropped; those with errors are apart."""
    long = "".join(dialogue(f"q{i}", "a " * 200) + dialogue(*(["r", f"b{i} "] * 30)) for i in range(3))
    Path("d").write_text(corpus() + long + "<|endoftext|>\n<|assistant|>\na\n" + dialogue("q", "a"))
    Path("e").write_text(dialogue("q", "a") + long)
    Path("x").write_text(corpus() + dialogue("x", "y"))
    options = ("--max-length", 128, "--skip-bad", *(["--eval-files", *evaluated.split()] if evaluated else []))
    counts = prepare(encode, *options, "--train-files", *trained.split()).counts
    files = {*evaluated.split(), *trained.split()}
    assert counts["conversations"] == sum({"d": 57, "e": 7, "x": 51}[file] for file in files)
    assert counts["skipped"] == 1 and (counts["copies"] > 0) == bool(evaluated)
    used = counts["trained_on"] + counts["held_out"] + counts["copies"]
    assert used + counts["dropped"] == counts["conversations"]
    assert counts["dropped"] >= 3 and counts["split"] >= 3 and counts["lost_trained_tokens"] > 3 * 200


def test_one_conversation_leaves_nothing_to_hold_out(cache, encode):
    Path("d").write_text(dialogue("q", "a", "r", "b"))
    plan = prepare(encode)
    assert plan.eval_rows is None
    assert [finding[1:4] for finding in plan.findings] == [("d", 2, "several exchanges"), ("d", 1, "held out")]
    assert prepare(encode, "--eval-fraction", 0).findings == plan.findings[:1]


def test_a_run_that_would_train_on_nothing_stops(cache, encode):
    Path("d").write_text(dialogue("q", "long " * 100) + dialogue("r", "long " * 100))
    Path("e").write_text(dialogue("q", "a"))
    for options in ((), ("--overlong", "drop"), ("--no-packing",), ("--train-files", "e", "--eval-files", "d")):
        assert_says(error_of(prepare, encode, "--max-length", 64, *options), "d", "--max-length 64")


def test_a_copied_checkpoint_is_no_checkpoint(tmp_path):
    """A folder that the user has copied beside the checkpoints neither stops a --resume nor is it used."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "file").write_text("x")
    sft.complete_checkpoint(folder)
    shutil.copytree(folder, tmp_path / "checkpoint-30.keep")
    assert sft.newest_checkpoint(tmp_path) == str(folder)


# ---- the cache of tokens ----


def test_a_second_start_finds_the_cache(cache, encode):
    Path("d").write_text(corpus() + dialogue("q", "a " * 300))
    args = arguments("--max-length", "256")
    found, warnings, samples = sft.read_data(sft.find_files(["d"]), args, encode)
    (made,) = samples.cache_files
    before = os.stat(made["filename"])
    assert encode.encoded > 50 and Path(made["filename"]).is_relative_to(cache)
    assert found["conversations"] == 51 and found["dropped"] == 1 and found["lost_trained_tokens"] > 300
    encode.encoded = 0
    found_again, warned_again, again = sft.read_data(sft.find_files(["d"]), args, encode)
    after = os.stat(made["filename"])
    assert encode.encoded == 0 and (found_again, warned_again) == (found, warnings)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert again.to_dict() == samples.to_dict() and len(again) == 50


def test_the_cache_notices_every_change(cache, encode, smollm2_tokenizer):
    Path("d").write_text(corpus())
    as_chatml, seen = Counting(smollm2_tokenizer, sft.chat_format("chatml", smollm2_tokenizer)), set()

    def prepared(*options, encode=encode):
        encode.encoded = 0
        samples = sft.read_data(sft.find_files(["d"]), arguments(*options), encode)[2]
        assert encode.encoded and samples.cache_files[0]["filename"] not in seen, "not noticed"
        seen.add(samples.cache_files[0]["filename"])
        return samples

    assert max(map(len, prepared()["input_ids"])) > 100
    assert max(map(len, prepared("--max-length", 100)["input_ids"])) <= 100
    assert len(prepared("--max-length", 100, "--overlong", "drop")) < 50
    assert prepared(encode=as_chatml)["input_ids"][0][0] == 1  # <|im_start|>
    Path("d").write_text(corpus().replace("q0", "x0"))  # the same size, a moment later
    prepared()
    prepared("--input-format", "chatml")


def test_an_error_leaves_no_half_cache(cache, encode):
    Path("d").write_text(corpus() + "<|assistant|>\n")
    error_of(sft.read_data, sft.find_files(["d"]), arguments(), encode)
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


# ---- one batch ----


def row_of(*samples) -> dict:
    """A row as Rows returns it, from (ids, labels) written by hand."""
    ids, labels = ([np.array(part, np.int32) for part in parts] for parts in zip(*samples, strict=True))
    return {"input_ids": ids, "labels": labels, "file": ["d"] * len(ids), "line": list(range(1, len(ids) + 1))}


def test_collate_exact():
    one = row_of(([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9]))
    batch = sft.collate([one, row_of(([1, 2, 3, 4], [-100, -100, 3, -100]))])
    expected = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 1, 2, 3, 4]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 9], dtype=torch.int32),
        "logits_to_keep": torch.tensor([0, 1, 3, 6]),
        "labels": torch.tensor([[6, 7, 9, 3]]),
        "shift_labels": torch.tensor([[6, 7, 9, 3]]),
    }  # fmt: skip
    assert batch.pop("max_length_q") == 4
    assert batch.pop("documents") == ["d:1", "d:2", "d:1"]
    assert batch.keys() == expected.keys()  # no attention_mask: transformers would join the documents
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype and torch.equal(batch[name], tensor), name


# ---- the model on packed rows ----


def load(folder, attention):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def test_packed_logits_are_those_of_each_document_alone(tiny_llama31):
    """Their losses and gradients: test_families.py."""
    random = np.random.default_rng(7)
    documents = [random.integers(0, 128000, length).tolist() for length in (60, 2, 17, 33, 5, 48, 9)]
    rows = [row_of(*((ids, ids) for ids in some)) for some in (documents[:3], documents[3:])]
    batch = sft.collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q")}
    packed, alone = load(tiny_llama31, "sdpa"), load(tiny_llama31, "eager")
    with torch.no_grad():
        together = packed(**inputs, use_cache=False).logits[0]
        apart = torch.cat([alone(input_ids=torch.tensor([ids])).logits[0] for ids in documents])
        leaking = alone(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[0]
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert (leaking - apart).abs().max() > 0.01
