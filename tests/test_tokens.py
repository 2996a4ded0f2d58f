"""Turns -> tokens with two real vocabularies: training sees the ids that a runtime sends, and trains only answers."""

from collections import Counter
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

import train_sft_dolores as sft
from train_sft_dolores import IGNORE, Conversation, Turn

FITTING = [("llama31", "dolores"), ("llama31", "llama3"), ("smollm2", "dolores"), ("smollm2", "chatml")]
property_test = settings(deadline=None, database=None, max_examples=60)


class Chat(NamedTuple):
    tokenizer: object
    chat: sft.ChatFormat
    encode: sft.Encoder
    template: str  # what is exported as chat_template.jinja
    missing: set[int]  # bytes without a token: 21 in SmolLM2's vocabulary, none in Llama 3.1's

    def __repr__(self):
        return self.chat.eos_token  # the tokenizer's repr is long

    @property
    def bos(self) -> str:
        return self.tokenizer.decode(self.encode.start)

    def render(self, turns, answering=False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=answering
        )

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encodable(self, turns):
        """The turns without characters that the vocabulary has no tokens for."""
        keep = lambda text: "".join(c for c in text if not self.missing.intersection(c.encode()))  # noqa: E731
        return [turn._replace(content=keep(turn.content).strip() or "x") for turn in turns]

    def control_ids(self, ids) -> list[int]:
        control = set(self.tokenizer.added_tokens_decoder)
        return [i for i in ids if i in control]


def make_chat(tokenizer, name: str) -> Chat:
    chat = sft.chat_format(name, tokenizer)
    vocabulary = tokenizer.get_vocab()
    missing = {byte for byte, character in bytes_to_unicode().items() if character not in vocabulary}
    assert len(missing) == {"<|eot_id|>": 0, "<|im_end|>": 21}[tokenizer.eos_token]
    return Chat(tokenizer, chat, sft.Encoder(tokenizer, chat), sft.chat_template(chat), missing)


@pytest.fixture(scope="module", params=FITTING, ids="-".join)
def chat(request) -> Chat:
    vocabulary, name = request.param
    return make_chat(request.getfixturevalue(f"{vocabulary}_tokenizer"), name)


@pytest.fixture(scope="module")
def small(smollm2_tokenizer) -> Chat:
    return make_chat(smollm2_tokenizer, "dolores")


def turns_of(*contents, system=None) -> list[Turn]:
    """Turns with these contents, the user first; their lines are 1, 2, 3 …"""
    pairs = [("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    pairs = [("system", system), *pairs] if system else pairs
    return [Turn(role, content, line) for line, (role, content) in enumerate(pairs, 1)]


def trained_spans(labels) -> list[slice]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels != IGNORE, [0]]).astype(int)))
    return [slice(*pair) for pair in edges.reshape(-1, 2)]


# ---- one small conversation, spelled out ----

SMALL = turns_of("Ça va ?", "Oui, ça va.", "Et là ?", "Bien !", system="Tu es Dolores.")
# fmt: off
SPELLED = {
    # (text before an answer, answer with its end token), …, text after the last one
    ("llama31", "dolores"): [
        [128000, 27, 91, 9125, 91, 397, 54071, 1560, 25227, 4692, 627,  # <|system|>⏎ Tu es Dolores.⏎
         27, 91, 882, 91, 397, 47013, 64, 11412, 18072, 27, 91, 78191, 91, 397],  # <|user|>⏎ Ça va ?⏎ <|assistant|>⏎
        [46, 2005, 11, 39043, 11412, 13, 128009],  # Oui, ça va.<|eot_id|>
        [198, 27, 91, 882, 91, 397, 32960, 39015, 18072, 27, 91, 78191, 91, 397],  # ⏎<|user|>⏎ Et là ?⏎ <|assistant|>⏎
        [82606, 758, 128009],  # Bien !<|eot_id|>
        [198],
    ],
    ("llama31", "llama3"): [
        [128000, 128006, 9125, 128007, 271, 54071, 1560, 25227, 4692, 13, 128009,
         128006, 882, 128007, 271, 47013, 64, 11412, 949, 128009, 128006, 78191, 128007, 271],
        [46, 2005, 11, 39043, 11412, 13, 128009],
        [128006, 882, 128007, 271, 32960, 39015, 949, 128009, 128006, 78191, 128007, 271],
        [82606, 758, 128009],
        [],
    ],
    ("smollm2", "dolores"): [
        [44, 108, 9690, 108, 46, 198, 68, 101, 1599, 27288, 2479, 30, 198,
         44, 108, 4093, 108, 46, 198, 142, 225, 81, 46316, 9148, 198, 44, 108, 520, 9531, 108, 46, 198],
        [63, 9010, 28, 5549, 117, 81, 46316, 30, 2],
        [198, 44, 108, 4093, 108, 46, 198, 47757, 303, 16739, 9148, 198, 44, 108, 520, 9531, 108, 46, 198],
        [50, 6522, 5728, 2],
        [198],
    ],
    ("smollm2", "chatml"): [
        [1, 9690, 198, 68, 101, 1599, 27288, 2479, 30, 2, 198,
         1, 4093, 198, 142, 225, 81, 46316, 9148, 2, 198, 1, 520, 9531, 198],
        [63, 9010, 28, 5549, 117, 81, 46316, 30, 2],
        [198, 1, 4093, 198, 47757, 303, 16739, 9148, 2, 198, 1, 520, 9531, 198],
        [50, 6522, 5728, 2],
        [198],
    ],
}
# fmt: on


@pytest.mark.parametrize("vocabulary, name", FITTING, ids=map("-".join, FITTING))
def test_exact_ids_of_a_small_conversation(vocabulary, name, request):
    encode = make_chat(request.getfixturevalue(f"{vocabulary}_tokenizer"), name).encode
    pieces = SPELLED[vocabulary, name]
    labels = [piece if i % 2 else [IGNORE] * len(piece) for i, piece in enumerate(pieces)]
    ((ids, got),) = encode([SMALL])
    assert ids.dtype == got.dtype == np.int32
    assert ids.tolist() == list(chain(*pieces))
    assert got.tolist() == list(chain(*labels))


def test_an_answer_that_is_only_context(chat):
    """Its ids are the same as those of a trained one; nothing of it is trained, its end token neither."""
    context = [SMALL[0], SMALL[1], SMALL[2]._replace(trained=False), *SMALL[3:]]
    ((ids, labels),), ((same, trained),) = chat.encode([context]), chat.encode([SMALL])
    assert ids.tolist() == same.tolist()
    first, second = trained_spans(trained)
    assert trained_spans(labels) == [second] and (labels[first] == IGNORE).all()


# ---- any conversation ----

PLAIN = ["é", "ça va ?", "Œuvre", "🙂", "👩‍👧", "日本", "{{ x }}", "{% raw %}", "{", "}", '"', "'", "«\u00a0oui\u00a0»", "\n", "\n\n\n", "  ",
         "\t", "\r\n", "\\n", "\\<|user|>", "1234", "…", "$\\frac{a}{b}$", "\0", "\u202e", "\ufeff", "\u200b", "a", "!", ">", "<|", "|>"]  # fmt: skip
TAGS = ["<|user|>", "\n<|assistant|>\n", "<|system|>\n", "<s>", "</s>", "[INST]", "<|nothing|>"]
CONTROL = ["<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eom_id|>",
           "<|python_tag|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_7|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n",
           "<|endoftext|>", "<repo_name>", "<file_sep>", "<empty_output>"]  # fmt: skip


def conversations(*atoms):
    """Turns of such contents, as the readers return them: stripped, never empty, the assistant last."""
    some = st.sampled_from([atom for group in atoms for atom in group]) | st.text(max_size=6)
    content = st.lists(some, min_size=1, max_size=6).map("".join).map(str.strip).filter(bool)
    contents = st.lists(st.tuples(content, content), min_size=1, max_size=3).map(lambda pairs: list(chain(*pairs)))
    return st.builds(lambda contents, system: turns_of(*contents, system=system), contents, st.none() | content)


@property_test
@given(turns=conversations(PLAIN, TAGS))
def test_the_prompt_a_runtime_sends_is_a_prefix(chat, turns):
    """True for every assistant turn: the ids of the history are those that were trained."""
    assume(not any(chat.encode.special.search(turn.content) for turn in turns))
    ((ids, _),) = chat.encode([turns])
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            prompt = chat.tokenizer(chat.render(turns[:i], answering=True)).input_ids  # adds BOS, once
            assert prompt == ids[: len(prompt)].tolist()


@property_test
@given(turns=conversations(PLAIN, TAGS, CONTROL, CONTROL))
def test_text_labels_and_control_tokens(chat, turns):
    turns = chat.encodable(turns)
    ((ids, labels),) = chat.encode([turns])
    assert len(ids) == len(labels) and ids.dtype == labels.dtype == np.int32
    # The ids decode to the text that the template renders.
    assert chat.decode(ids) == chat.bos + chat.render(turns)
    # Each answer and its end token are trained, nothing else.
    spans = trained_spans(labels)
    assert [chat.decode(ids[span]) for span in spans] == [
        turn.content + chat.chat.eos_token for turn in turns if turn.role == "assistant"
    ]
    assert all((labels[span] == ids[span]).all() for span in spans)
    # No control tokens but those of the format, whatever the contents are.
    eos = chat.tokenizer.convert_tokens_to_ids(chat.chat.eos_token)
    neutral = chat.tokenizer(chat.render([turn._replace(content="x") for turn in turns])).input_ids
    assert chat.control_ids(ids.tolist()) == chat.control_ids(neutral)
    assert [ids[span.stop - 1] for span in spans] == [eos] * len(spans)
    assert all(chat.control_ids(ids[span.start : span.stop - 1].tolist()) == [] for span in spans)


def test_every_control_token_of_the_vocabulary_is_text_in_contents(chat):
    every = [token for token, i in sorted(chat.encode.special_ids.items())]
    assert len(every) == {"<|eot_id|>": 256, "<|im_end|>": 17}[chat.chat.eos_token]
    turns = turns_of("".join(every), " ".join(every), system="\n".join(every))
    ((ids, _),) = chat.encode([turns])
    neutral = chat.tokenizer(chat.render(turns_of("x", "x", system="x"))).input_ids
    assert chat.control_ids(ids.tolist()) == chat.control_ids(neutral)
    assert chat.decode(ids) == chat.bos + chat.render(turns)


def test_a_batch_is_its_conversations(chat):
    batch = [SMALL, SMALL[1:], turns_of("q", "<|eot_id|>"), [SMALL[0]], []]
    together = chat.encode(batch)
    assert len(together) == len(batch)
    for turns, (ids, labels) in zip(batch, together, strict=True):
        ((alone, alone_labels),) = chat.encode([turns])
        assert ids.tolist() == alone.tolist() and labels.tolist() == alone_labels.tolist()
    assert together[-1][0].tolist() == chat.encode.start


def test_padding_and_truncation_of_a_saved_tokenizer_are_off(small):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(small.tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(length=100)
    backend.enable_truncation(3)
    saved = sft.Vocabulary(Tokenizer.from_str(backend.to_str()), small.tokenizer.eos_token)
    ((ids, labels),), ((same_ids, same_labels),) = sft.Encoder(saved, small.chat)([SMALL]), small.encode([SMALL])
    assert ids.tolist() == same_ids.tolist() and labels.tolist() == same_labels.tolist()


# ---- longer than a row ----


def encoded(data, encode, max_length, overlong="split") -> tuple[list[SimpleNamespace], dict, list[sft.Finding]]:
    """The samples of these conversations, counts and findings."""
    counts, findings = Counter(split=0, dropped=0, dropped_exchanges=0, lost_trained_tokens=0), []
    samples = sft.encode_conversations(data, encode, max_length, overlong, counts, findings)
    return [SimpleNamespace(**sample) for sample in samples], counts, findings


def parts_of(conversations, *args):
    """(samples, [(line, text)] of the warnings) of lists of turns, each a conversation of its own."""
    samples, _, findings = encoded([Conversation(turns, "d", turns[0].line, []) for turns in conversations], *args)
    assert {finding[0::3] for finding in findings} <= {("warning", "split"), ("warning", "dropped")}
    return samples, [(finding.line, finding.text) for finding in findings]


def test_overlong_exact(small):
    turns = turns_of("q1", "a1", "q2", "a2 " + "long " * 40, "q3", "a3", "q4", "a4", "q5", "a5", system="S")
    whole = len(small.encode([turns])[0][0])
    exchange = len(small.encode([turns[:3]])[0][0]) - len(small.encode([turns[:1]])[0][0])
    room = len(small.encode([turns[:1]])[0][0]) + 2 * exchange
    samples, warned = parts_of([turns], small.encode, room)
    assert [small.decode(sample.input_ids) for sample in samples] == [
        small.render(turns[:1] + turns[start:end]) for start, end in ((1, 3), (5, 9), (9, 11))
    ]
    assert [line for line, _ in warned] == [1, 4]
    assert f"{whole} tokens" in warned[0][1] and "3" in warned[0][1].split("tokens")[1]
    assert {(sample.digest, sample.file, sample.line) for sample in samples} == {(sft.digest(turns), "d", 1)}
    # With one token less, two exchanges no longer fit; with all of them nothing is split.
    assert len(parts_of([turns], small.encode, room - 1)[0]) == 4
    assert len(parts_of([turns], small.encode, whole)[0]) == 1 and parts_of([turns], small.encode, whole)[1] == []


def test_what_is_split_and_dropped_is_counted(small):
    """Conversations, exchanges and the trained tokens that are lost; an answer that is only context loses none."""
    whole = turns_of("q", "a", system="S")
    split = turns_of("q1", "a1", "q2", "a2 " + "long " * 60, "q3", "a3", "q4", "a4 " + "x " * 20, system="S")
    gone = turns_of("q", "a " * 100)
    context = [*gone[:1], gone[1]._replace(trained=False), *turns_of("q", "a")]
    data = [Conversation(turns, "d", n, []) for n, turns in enumerate([whole, split, gone, context])]

    def trained(*conversations) -> int:
        return sum(sft.count_trained(labels) for _, labels in small.encode(list(conversations)))

    samples, counts, _ = encoded(data, small.encode, 64, "split")
    lost = trained(split[3:5], gone)
    assert counts == {"split": 1, "dropped": 1, "dropped_exchanges": 2, "lost_trained_tokens": lost}
    assert [(sample.line, sample.part) for sample in samples] == [(0, 0), (1, 0), (1, 1), (1, 2), (3, 0)]
    samples, counts, findings = encoded(data, small.encode, 64, "drop")
    lost = trained(split, gone, context)
    assert counts == {"split": 0, "dropped": 3, "dropped_exchanges": 0, "lost_trained_tokens": lost}
    assert [sample.line for sample in samples] == [0]
    assert [finding[:4] for finding in findings] == [("warning", "d", line, "dropped") for line in (1, 2, 3)]
    findings = encoded(data, small.encode, 64, "error")[2]
    assert [finding[:3] for finding in findings] == [("error", "d", line) for line in (1, 2, 3)]


@property_test
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=9),
    system=st.none() | st.integers(1, 20),
    late=st.booleans(),
    max_length=st.integers(16, 160),
)
def test_no_exchange_is_lost_without_a_warning(chat, sizes, system, late, max_length):
    """Exchanges that fit are there once, in order, after the system turn; for the others there is a warning."""
    contents = chain(*((f"q{i}" + " é" * q, f"a{i}" + " !" * a) for i, (q, a) in enumerate(sizes)))
    turns = turns_of(*contents, system="S" * system if system else None)
    if late:  # `messages` data may have a later system turn: it belongs to the exchange after it
        turns = sft.join_neighbors([*turns[:-2], Turn("system", "Plus tard", 99), *turns[-2:]])
    head = turns[:1] if turns[0].role == "system" else []
    starts = [
        i
        for i, (one, two) in enumerate(pairwise([Turn("assistant", "", 0), *turns[len(head) :]]))
        if one.role == "assistant" != two.role
    ]
    exchanges = [turns[len(head) :][a:b] for a, b in pairwise([*starts, None])]
    length = lambda turns: len(chat.encode([sft.join_neighbors(turns)])[0][0])  # noqa: E731

    samples, warned = parts_of([turns], chat.encode, max_length)
    assert all(len(sample.input_ids) <= max_length for sample in samples)
    if length(turns) <= max_length:
        assert [chat.decode(sample.input_ids) for sample in samples] == [chat.bos + chat.render(turns)] and not warned
        return
    lost = [exchange[0].line for exchange in exchanges if length(head + exchange) > max_length]
    split = [(line, text) for line, text in warned if f"{length(turns)} tokens" in text]
    assert [line for line, text in warned if (line, text) not in split] == lost
    assert len(split) == (len(samples) > 1)
    assert all(line == turns[0].line and str(len(samples)) in text.split("tokens")[1] for line, text in split)
    kept = [exchange for exchange in exchanges if exchange[0].line not in lost]
    for sample in samples:
        text, taken = chat.decode(sample.input_ids), 1
        while chat.bos + chat.render(head + list(chain(*kept[:taken]))) != text:
            taken += 1
            assert taken <= len(kept)
        answers = [turn.content + chat.chat.eos_token for turn in chain(*kept[:taken]) if turn.role == "assistant"]
        assert [chat.decode(sample.input_ids[span]) for span in trained_spans(sample.labels)] == answers
        kept = kept[taken:]
    assert kept == []


def test_a_system_turn_as_long_as_a_row_drops_every_exchange(small):
    """It is not encoded with each of them, which would take quadratic time."""
    turns, given = turns_of(*["q", "a"] * 400, system="s " * 400), []

    def encode(conversations):
        given.extend(conversations)
        return small.encode(conversations)

    assert sft.split_conversation(turns, encode, 64) == ([], turns[1::2])
    assert len(given) == 1
