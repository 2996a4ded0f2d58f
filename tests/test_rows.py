"""Tokens -> rows -> loss: packing loses nothing, no document sees another, and the loss is the model's own."""

import json
import os
import shutil
from itertools import chain
from pathlib import Path

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
    lengths = np.full(100, 40)
    one, two = (np.concatenate(sft.pack(lengths, 100, seed)) for seed in (1, 2))
    rows = lambda order: {frozenset(pair) for pair in order.reshape(-1, 2).tolist()}  # noqa: E731
    assert rows(one) != rows(two) and len(rows(one)) == 50


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
    digests = np.arange(1000)
    one, two = (sft.hold_out(digests, 0.1, seed) for seed in (1, 2))
    assert one.sum() == two.sum() == 100 and (one & two).sum() < 50


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


def corpus(conversations=40) -> str:
    """The i-th conversation has i % 5 + 1 exchanges and appears twice if i is a multiple of 4."""
    texts = [
        dialogue(*(f"{who}{i} {j} " + "oui " * (i % 7) for j in range(i % 5 + 1) for who in "qa"))
        for i in range(conversations)
    ]
    return "".join(text for i, text in enumerate(texts) for _ in range(1 if i % 4 else 2))


def samples_of(rows) -> list[tuple]:
    """(ids, labels, digest, line) of all samples of these rows."""
    columns = ("input_ids", "labels", "digest", "line")
    return [
        (tuple(map(int, ids)), tuple(map(int, labels)), int(digest), int(line))
        for row in (rows[i] for i in range(len(rows)))
        for ids, labels, digest, line in zip(*(row[column] for column in columns), strict=True)
    ]


def expected_samples(file, encode) -> list[tuple]:
    conversations = list(sft.read_conversations([file], "chatml"))
    tokens = encode([c.turns for c in conversations])
    return [
        (*map(tuple, map(np.ndarray.tolist, t)), sft.digest(c.turns), c.line)
        for c, t in zip(conversations, tokens, strict=True)
    ]


def prepare(args, encode) -> sft.Plan:
    """The plan of these flags; the training file is d unless they name another."""
    if args.train_files == ["train.chatml"]:
        args.train_files = ["d"]
    return planned(args, encode)


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_each_conversation_is_in_one_row(cache, encode, packing):
    Path("d").write_text(corpus())
    args = arguments("--max-length", "256", "--eval-fraction", "0.2", packing)
    plan = prepare(args, encode)
    train, held_out, counts = plan.train_rows, plan.eval_rows, plan.counts
    inside, outside = samples_of(train), samples_of(held_out)
    assert sorted(inside + outside) == sorted(expected_samples("d", encode))
    assert len(inside) + len(outside) == 50
    assert len({s[2] for s in outside}) == 8 and not {s[2] for s in inside} & {s[2] for s in outside}
    tokens = [sum(map(len, train[i]["input_ids"])) for i in range(len(train))]
    assert max(tokens) <= 256
    assert counts["conversations"] == 50 and counts["held_out"] == len(outside) and counts["rows"] == len(train)
    assert counts["trained_on"] == len(inside) and counts["dropped"] == counts["skipped"] == 0
    assert counts["tokens"] == sum(tokens) and counts["fill"] == round(sum(tokens) / 256 / len(train), 4)
    assert counts["trained_tokens"] == sum(label != IGNORE for s in inside for label in s[1])
    assert counts["steps_per_epoch"] == -(-len(train) // 32)
    if packing == "--packing":
        assert len(train) < len(inside) / 2
    else:
        assert len(train) == len(inside) and len(held_out) == len(outside)


def test_the_longest_row(cache, encode):
    """The memory probe takes it; without packing it may be any row."""
    Path("d").write_text(corpus() + dialogue("q", "long " * 200) + dialogue("r", "b"))
    args = arguments("--max-length", "256", "--eval-fraction", "0", "--no-packing")
    train = prepare(args, encode).train_rows
    sizes = [sum(map(len, train[i]["input_ids"])) for i in range(len(train))]
    assert sum(map(len, train.longest()["input_ids"])) == max(sizes) > sizes[-1]


def test_a_copied_checkpoint_is_no_checkpoint(tmp_path):
    """A folder that the user has copied beside the checkpoints neither stops a --resume nor is it used."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "file").write_text("x")
    sft.complete_checkpoint(folder)
    shutil.copytree(folder, tmp_path / "checkpoint-30.keep")
    assert sft.newest_checkpoint(tmp_path) == str(folder)


def test_no_hold_out_and_eval_files(cache, encode):
    Path("d").write_text(corpus())
    Path("e").write_text(dialogue("q", "a"))
    whole = sorted(expected_samples("d", encode))
    plan = prepare(arguments("--eval-fraction", "0"), encode)
    train, held_out, counts = plan.train_rows, plan.eval_rows, plan.counts
    assert sorted(samples_of(train)) == whole and held_out is None and counts["held_out"] == 0
    plan = prepare(arguments("--eval-files", "e"), encode)
    train, held_out = plan.train_rows, plan.eval_rows
    assert sorted(samples_of(train)) == whole and samples_of(held_out) == expected_samples("e", encode)


def test_what_is_evaluated_is_not_trained_on(cache, encode):
    """A file in both sets, and a copy in another file: both are held out, with a warning."""
    Path("d").write_text(corpus() + dialogue("q", "a"))
    Path("e").write_text(dialogue("q", "a") + dialogue("r", "b"))
    both = ("--train-files", "d", "e", "--eval-files")
    plan = prepare(arguments(*both, "e"), encode)
    train, held_out, counts, warnings = plan.train_rows, plan.eval_rows, plan.counts, plan.findings
    assert sorted(samples_of(held_out)) == sorted(expected_samples("e", encode))
    copies = {sample[2] for sample in expected_samples("e", encode)}
    assert sorted(samples_of(train)) == sorted(s for s in expected_samples("d", encode) if s[2] not in copies)
    # The copy in d is not trained on either; e is read once, and named once.
    assert (counts["trained_on"], counts["held_out"], counts["copies"], counts["conversations"]) == (50, 2, 1, 53)
    assert sorted(warning.file for warning in warnings if warning.kind == "held out") == ["d", "e"]
    error = error_of(prepare, arguments("--train-files", "e", "--eval-files", "d", "e"), encode)
    assert_says(error, "e", "--eval-files")


def test_parts_of_a_long_conversation_stay_on_one_side(cache, encode):
    long = [dialogue(*(f"{who}{i}.{j}" for j in range(30) for who in "qa")) for i in range(10)]
    Path("d").write_text("".join(long))
    args = arguments("--max-length", "64", "--eval-fraction", "0.3")
    plan = prepare(args, encode)
    train, held_out = plan.train_rows, plan.eval_rows
    inside, outside = samples_of(train), samples_of(held_out)
    assert len({s[2] for s in outside}) == 3 and len({s[2] for s in inside}) == 7 and len(inside) > 70
    assert not {s[2] for s in inside} & {s[2] for s in outside}
    trained = [label for s in inside + outside for label in s[1] if label != IGNORE]
    assert trained.count(encode.special_ids["<|im_end|>"]) == 300  # every answer of every conversation, once


def test_every_conversation_is_counted_once(cache, encode):
    """Read = trained on + held out + dropped, as the survey counts them; those with errors are apart."""
    long = "".join(dialogue(f"q{i}", "a " * 200) + dialogue(*(["r", f"b{i} "] * 30)) for i in range(3))
    Path("d").write_text(corpus() + long + "<|endoftext|>\n<|assistant|>\na\n" + dialogue("q", "a"))
    Path("e").write_text(dialogue("q", "a") + long)
    for options in ((), ("--eval-files", "e"), ("--eval-files", "e", "d", "--train-files", "e", "x")):
        Path("x").write_text(corpus() + dialogue("x", "y"))
        args = arguments("--max-length", "128", "--skip-bad", *options)
        counts = prepare(args, encode).counts
        train = args.train_files if "x" in options else ["d"]
        read = sft.read_data(sft.find_files(train) | sft.find_files(args.eval_files), args)[0]
        assert (counts["conversations"], counts["skipped"]) == (read["conversations"], read["skipped"])
        used = counts["trained_on"] + counts["held_out"] + counts["copies"]
        assert used + counts["dropped"] == counts["conversations"] and (counts["copies"] > 0) == (
            "e" in args.eval_files
        )
        assert counts["dropped"] >= 3 and counts["split"] >= 3 and counts["lost_trained_tokens"] > 3 * 200


def test_one_conversation_leaves_nothing_to_hold_out(cache, encode):
    Path("d").write_text(dialogue("q", "a", "r", "b"))
    data = prepare(arguments(), encode)
    assert data.eval_rows is None and [finding[1:4] for finding in data.findings] == [
        ("d", 2, "several exchanges"),
        ("d", 1, "held out"),
    ]
    assert prepare(arguments("--eval-fraction", "0"), encode).findings == data.findings[:1]


def test_a_run_that_would_train_on_nothing_stops(cache, encode):
    Path("d").write_text(dialogue("q", "long " * 100) + dialogue("r", "long " * 100))
    Path("e").write_text(dialogue("q", "a"))
    for options in ((), ("--overlong", "drop"), ("--no-packing",)):
        error = error_of(prepare, arguments("--max-length", "64", *options), encode)
        assert_says(error, "d", "--max-length 64")
    error = error_of(prepare, arguments("--max-length", "64", "--train-files", "e", "--eval-files", "d"), encode)
    assert_says(error, "d", "--max-length 64")


# ---- the cache of tokens ----


def test_prepare_finds_its_cache_again(cache, encode):
    Path("d").write_text(corpus() + dialogue("q", "a " * 300))
    args = arguments("--max-length", "256")
    found, warnings, samples = sft.read_data(sft.find_files(["d"]), args, encode)
    (made,) = samples.cache_files
    before, encoded = os.stat(made["filename"]), encode.encoded
    assert encoded > 50 and Path(made["filename"]).is_relative_to(cache)
    dropped = [warning.line for warning in warnings if warning.kind == "dropped"]
    assert dropped == [expected_samples("d", encode)[-1][3]]
    assert found["conversations"] == 51 and found["dropped"] == 1 and found["lost_trained_tokens"] > 300

    encode.encoded = 0
    found_again, warned_again, again = sft.read_data(sft.find_files(["d"]), args, encode)
    after = os.stat(made["filename"])
    assert again.cache_files == [made] and encode.encoded == 0 and (found_again, warned_again) == (found, warnings)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert again.to_dict() == samples.to_dict() and len(again) == 50


def test_prepare_notices_every_change(cache, encode, smollm2_tokenizer):
    Path("d").write_text(corpus())
    llama_like = Counting(smollm2_tokenizer, sft.chat_format("chatml", smollm2_tokenizer))
    plain, seen = arguments("--max-length", "256"), set()

    def prepared(args=plain, encode=encode):
        encode.encoded = 0
        samples = sft.read_data(sft.find_files(["d"]), args, encode)[2]
        assert encode.encoded and samples.cache_files[0]["filename"] not in seen, "not noticed"
        seen.add(samples.cache_files[0]["filename"])
        return samples

    assert max(map(len, prepared()["input_ids"])) > 100
    assert max(map(len, prepared(arguments("--max-length", "100"))["input_ids"])) <= 100
    assert len(prepared(arguments("--max-length", "100", "--overlong", "drop"))) < 50
    assert prepared(encode=llama_like)["input_ids"][0][0] == 1  # <|im_start|>
    Path("d").write_text(corpus().replace("q0", "x0"))  # the same size, a moment later
    prepared()
    Path("d").write_text(
        json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    )
    assert len(prepared(arguments("--max-length", "256", "--input-format", "messages"))) == 1


def test_an_error_leaves_no_half_cache(cache, encode):
    Path("d").write_text(corpus() + "<|assistant|>\n")
    error_of(sft.read_data, sft.find_files(["d"]), arguments(), encode)
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


# ---- one batch ----


def row_of(*samples) -> dict:
    """A row as Rows returns it, from (ids, labels) written by hand."""
    ids, labels = ([np.array(sample[i], np.int32) for sample in samples] for i in (0, 1))
    return {
        "input_ids": ids,
        "labels": labels,
        "digest": [0] * len(ids),
        "file": ["d"] * len(ids),
        "line": list(range(1, len(ids) + 1)),
    }


def test_collate_exact():
    batch = sft.collate(
        [row_of(([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9])), row_of(([1, 2, 3, 4], [-100, -100, 3, -100]))]
    )
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


@pytest.fixture(scope="module")
def documents() -> list[tuple]:
    """(ids, labels) of seven documents of 2 to 60 tokens; about half the tokens are trained."""
    random = np.random.default_rng(7)
    found = []
    for length in (60, 2, 17, 33, 5, 48, 9):
        ids = random.integers(0, 128000, length)
        trained = random.random(length) < 0.5
        trained[0], trained[-1] = False, True
        found.append((ids.tolist(), np.where(trained, ids, IGNORE).tolist()))
    return found


def load(folder, attention):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def test_packed_logits_are_those_of_each_document_alone(tiny_llama31, documents):
    batch = sft.collate([row_of(*documents[:3]), row_of(*documents[3:])])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q")}
    packed, alone = load(tiny_llama31, "sdpa"), load(tiny_llama31, "eager")
    with torch.no_grad():
        together = packed(**inputs, use_cache=False).logits[0]
        apart = [alone(input_ids=torch.tensor([ids])).logits[0] for ids, _ in documents]
        joined = alone(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            attention_mask=torch.ones_like(inputs["input_ids"]),
        ).logits[0]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)
    assert (joined - torch.cat(apart)).abs().max() > 0.01  # one long document: what a leak would look like


@pytest.mark.parametrize("num_items", [None, 1000])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_the_loss_is_that_of_the_plain_model(tiny_llama31, documents, packed, num_items):
    """So are the gradients of all weights below the head."""
    documents = documents if packed else documents[:1]
    ours, plain = load(tiny_llama31, "sdpa"), load(tiny_llama31, "eager")
    ours.lm_head.requires_grad_(False)
    plain.lm_head.requires_grad_(False)
    batch = sft.collate([row_of(*documents)])
    del batch["documents"]
    loss = ours(
        **batch, use_cache=False, num_items_in_batch=None if num_items is None else torch.tensor(num_items)
    ).loss
    loss.backward()

    count = sum(label != IGNORE for _, labels in documents for label in labels)
    expected = 0
    for ids, labels in documents:
        part = plain(
            input_ids=torch.tensor([ids]),
            labels=torch.tensor([labels]),
            num_items_in_batch=torch.tensor(num_items or count),
        ).loss
        part.backward()
        expected += part.detach()
    if not packed and num_items is None:
        assert torch.equal(expected, plain(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.detach())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    gradients = {name: weight.grad for name, weight in plain.named_parameters() if weight.grad is not None}
    assert len(gradients) == 2 + 2 * 9 and max(grad.abs().max() for grad in gradients.values()) > 1e-3
    for name, weight in ours.named_parameters():
        if name in gradients:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-6)
