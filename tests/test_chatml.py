"""Text -> turns: both ChatML dialects and rows of other formats, the place of each error, hostile data."""

import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import arguments, assert_says, error_of

import train_sft_dolores as sft

U, A = "<|user|>\nq\n", "<|assistant|>\na\n"
OK = U + A
QA = [("user", "q"), ("assistant", "a")]
SQA = [("system", "S"), *QA]
OPENAI = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": " q\n"},
    {"role": "assistant", "content": "a"},
]
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PROMPT = {"prompt": "q", "completion": " a"}
ALPACA = {"instruction": "q", "input": "", "output": "a"}
fuzz = settings(deadline=None, database=None, max_examples=150)


def write(file: str, content) -> str:
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def row(*turns, **fields) -> str:
    """A JSON line in OpenAI's layout."""
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **fields})


def answer(**fields) -> str:
    """A row whose answer has these keys too."""
    return json.dumps({"messages": [OPENAI[1], {**OPENAI[2], **fields}]})


def read(*files: str, input_format="auto") -> tuple[list, list]:
    """[[(role, content)]] of each conversation, and the warnings as [(line, kind, text)]; InputError for an error."""
    conversations, warned = [], []
    for conversation in sft.read_conversations(list(files), input_format):
        for finding in conversation.findings:
            assert finding.file in files
            if finding.level == "error":
                raise sft.InputError(str(finding))
            warned += [finding[2:]] if finding.level == "warning" else []
        conversations.append([(turn.role, turn.content) for turn in conversation.turns])
    return conversations, warned


def load(content, file="d.chatml") -> list[list[tuple[str, str]]]:
    """The conversations of a file with this content."""
    return read(write(file, content))[0]


def warned(content, file="d.chatml") -> list[tuple]:
    """Its warnings as [(line, kind, text)]."""
    return read(write(file, content))[1]


def survey(*files, skip_bad=False) -> tuple[dict, list]:
    """(counts, findings) of these files."""
    return sft.read_data(sft.find_files(list(files)), arguments(*["--skip-bad"] * skip_bad))[:2]


def listed(*files, **options) -> list[str]:
    """The lines of the error that the survey of these files raises."""
    return error_of(survey, *files, **options).split("\n")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Messages name files as the user gave them: short names, when the test works in their folder."""
    monkeypatch.chdir(tmp_path)


# ---- the two dialects ----

DIALECTS = {
    "next line": (OK, [QA]),
    "same line": ("<|user|>q\n<|assistant|> a", [QA]),
    "both": ("<|user|> q\nr\n<|assistant|>\na\n\n b", [[("user", "q\nr"), ("assistant", "a\n\n b")]]),
    "edges stripped": ("\n\n<|user|>\n\n \tq \n\n<|assistant|>\n\u00a0a\u2028\n", [QA]),
    "inner white space kept": ("<|user|>\nq\n<|assistant|>\na  \n\n\n\tb", [[QA[0], ("assistant", "a  \n\n\n\tb")]]),
    "tag inside a line": ("<|user|>\nq <|assistant|>\n" + A, [[("user", "q <|assistant|>"), QA[1]]]),
    "no tag": ("<|user|>\n<|a b|> <||> <|é|\n" + A, [[("user", "<|a b|> <||> <|é|"), QA[1]]]),
    "im": ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n", [QA]),
    "im, end on its line": ("<|im_start|> user \nq\n<|im_end|>\n\n<|im_start|>assistant\n\na\n<|im_end|>", [QA]),
    "im, tags are text": ("<|im_start|>user\n<|user|>\n<|endoftext|>\n<|im_end|>\n" + A, [[("user", "<|user|>\n<|endoftext|>"), QA[1]]]),
    "mixed": ("<|user|>\nq\n<|im_start|>assistant\na<|im_end|>\n<|endoftext|>\n" + OK, [QA, QA]),
    "neighbors joined": (U + "<|user|>\nr\n" + A + "<|assistant|>b", [[("user", "q\n\nr"), ("assistant", "a\n\nb")]]),
    "developer": ("<|developer|>\nS\n" + OK, [SQA]),
    "BOM and zero width before a tag": ("\ufeff" + OK + "\ufeff<|endoftext|>\n\u200b\u2060" + OK, [QA, QA]),
    "BOM elsewhere is text": ("<|user|>\n\ufeffq\n" + A, [[("user", "\ufeffq"), QA[1]]]),
    "CRLF": ("<|user|>\r\nq\r\nr\r\n<|assistant|>\r\na\r\n<|endoftext|>\r\n", [[("user", "q\nr"), QA[1]]]),
    "old Mac": ("<|user|>\rq\rr\r<|assistant|>\ra\r<|endoftext|>\r", [[("user", "q\nr"), QA[1]]]),
    "no separator": (OK + OK, [QA + QA]),
    "a system turn starts one": (OK + ("<|system|>\nS\n" + OK) * 2, [QA, SQA, SQA]),
    "im, a system turn starts one": (("<|im_start|>system\nS<|im_end|>\n" + OK) * 2, [SQA, SQA]),
    "separators": (OK + "<|endoftext|>\n\n" + OK + "<|endoftext|>\n<|endoftext|>\n", [QA, QA]),
    "escaped": ("<|user|>\nq\n\\<|user|>\n\\\\<|user|>\nx \\<|user|>\n" + A, [[("user", "q\n<|user|>\n\\<|user|>\nx \\<|user|>"), QA[1]]]),
    "im, escaped": ("<|im_start|>user\nq\n\\<|im_start|>\nx\\<|im_end|>\\\\<|im_end|><|im_end|>\n" + A,
                    [[("user", "q\n<|im_start|>\nx<|im_end|>\\<|im_end|>"), QA[1]]]),
}  # fmt: skip


@pytest.mark.parametrize("text, expected", DIALECTS.values(), ids=DIALECTS)
def test_chatml(text, expected):
    assert load(text) == expected


def test_line_numbers():
    write("d.chatml", "\n" + OK + "<|endoftext|>\n\n<|system|>\nS\n\n" + OK)
    one, two = sft.read_conversations(["d.chatml"], "chatml")
    assert (one.file, one.line, [turn.line for turn in one.turns]) == ("d.chatml", 2, [2, 4])
    assert (two.file, two.line, [turn.line for turn in two.turns]) == ("d.chatml", 8, [8, 11, 13])
    write("d.jsonl", "\n" + row(*QA) + "\n\n" + row(*QA))
    assert [(c.line, c.turns[0].line) for c in sft.read_conversations(["d.jsonl"], "auto")] == [(2, 2), (4, 4)]


ATOMS = ["\n", "\n\n", "\\", "\\\\", " ", "<|user|>", "<|system|>", "<|im_start|>user", "<|im_end|>", "<|endoftext|>",
         "<|eot_id|>", "<|oops|>", "<|", "|>", "{{ x }}", "é", "🙂", "\u202e", "\x85", "\u2028", "a"]  # fmt: skip
contents = st.lists(st.sampled_from(ATOMS), min_size=1, max_size=12).map("".join).map(str.strip)
contents = contents.filter(sft.VISIBLE.search).filter(lambda text: not sft.UNSEEN_BEFORE_TAG.search(text))
chats = st.tuples(contents | st.none(), st.lists(st.tuples(contents, contents), min_size=1, max_size=3))


def as_turns(chat) -> list[tuple[str, str]]:
    system, exchanges = chat
    pairs = [pair for q, a in exchanges for pair in (("user", q), ("assistant", a))]
    return [("system", system), *pairs] if system else pairs


@fuzz
@given(st.lists(chats, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_any_contents_can_be_written_and_read(data, im, crlf):
    """In both dialects: a backslash before anything that would be a tag is enough."""
    lines = []
    for chat in data:
        lines.append("<|endoftext|>")
        for role, content in as_turns(chat):
            if im:
                content = re.sub(r"(\\*<\|im_end\|>|^\\*<\|im_start\|>)", r"\\\1", content, flags=re.MULTILINE)
                lines += [f"<|im_start|>{role}", content, "<|im_end|>"]
            else:
                content = re.sub(r"^(\\*<\|[^|<>\s]{1,40}\|>)", r"\\\1", content, flags=re.MULTILINE)
                lines += [f"<|{role}|>", content]
    assert load("\n".join(lines).replace("\n", "\r\n" if crlf else "\n")) == [as_turns(chat) for chat in data]


def trained_answers(content) -> list[tuple[str, bool]]:
    """[(content, trained)] of all answers."""
    found = sft.read_conversations([write("d", content)], "auto")
    return [(turn.content, turn.trained) for c in found for turn in c.turns if turn.role == "assistant"]


FLAGS = [
    ({"weight": 0}, {"weight": 1}), ({"weight": 0.0}, {}), ({"train": False}, {"train": True}), ({"loss": False}, {"loss": True}),
    ({"training": False}, {"weight": None}), ({"trainable": False}, {"train": True, "weight": 1}), ({"train": False, "weight": 1}, {}),
]  # fmt: skip


@pytest.mark.parametrize("off, on", FLAGS)
def test_flags_of_answers_that_are_only_context(off, on):
    """What OpenAI, Axolotl, ms-swift and others call them."""
    turns = [OPENAI[1], {**OPENAI[2], **off}, OPENAI[1], {**OPENAI[2], "content": "b", **on}]
    assert trained_answers(json.dumps({"messages": turns})) == [("a", False), ("b", True)]


def test_answers_that_are_only_context():
    other = U + "<|assistant:context|> a\n" + U + "<|assistant|>\nb\n"
    im = U + "<|im_start|>assistant:context\na<|im_end|>\n" + U + "<|im_start|>assistant\nb<|im_end|>\n"
    assert trained_answers(other) == trained_answers(im) == [("a", False), ("b", True)]
    (context,) = sft.read_conversations(["d"], "chatml")
    assert sft.digest(context.turns) != sft.digest([turn._replace(trained=True) for turn in context.turns])


# ---- files ----


def test_several_files_and_globs():
    Path("sub").mkdir()
    for number, name in enumerate(("b.chatml", "a.chatml", "sub/c.chatml", "x [1].chatml", "x 1.chatml"), 1):
        write(name, OK.replace("q", str(number)))

    def asked(*patterns) -> str:
        """What the user says in each conversation of the files that match."""
        return "".join(conversation[0][1] for conversation in read(*sft.find_files(list(patterns)))[0])

    assert asked("b.chatml", "a.chatml") == "12"
    assert asked("[ab].chatml", "b.chatml") == "21"
    assert asked("**/*.chatml") == "21354"
    assert asked("x [1].chatml") == "4", "the name of an existing file is not a glob"


def test_a_folder_means_its_data_files():
    for name in ("x/b.chatml", "x/a.JSONL", "x/c.csv", "x/notes.md", "x/.hidden.txt", "x/sub/d.chatml", "empty/x.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write(name, "x")
    assert list(sft.find_files(["x"])) == list(sft.find_files(["x/"])) == ["x/a.JSONL", "x/b.chatml", "x/c.csv"]
    assert list(sft.find_files(["x/c.csv", "x", "x/s*"])) == ["x/c.csv", "x/a.JSONL", "x/b.chatml", "x/sub/d.chatml"]
    assert_says(error_of(sft.find_files, ["empty"]), "empty", ".jsonl")


def test_files_that_cannot_be_read(tmp_path):
    os.mkfifo("pipe")
    Path("folder").mkdir()
    os.close(os.open(os.fsencode(tmp_path) + b"/folder/caf\xe9.chatml", os.O_CREAT))
    facts = {"nô.chatml": "file", "*.chatml": "glob", ".": ".jsonl", "pipe": "once", "/proc/self/mem": "read"}
    for name, fact in facts.items():
        assert_says(error_of(sft.find_files, [name]), name, fact)
    assert_says(error_of(sft.find_files, ["folder"]), r"'folder/caf\udce9.chatml'", "UTF-8")
    for name, place in (("empty", "empty"), ("e.jsonl", "e.jsonl"), ("e.csv", "e.csv:1"), ("e.parquet", "e.parquet")):
        assert_says(error_of(load, "", name), place)


# ---- errors: what causes them; the lines, with their places, are in tests/screens/errors.txt ----

ERRORS = [
    ("d.chatml", OK.encode() + b"<|user|>\ncaf\xe9\n"),
    ("d.chatml", OK + "<|user|>\nr\0\0\n" + A),
    ("d.chatml", U + "<|assitant|>\na\n"),
    ("d.chatml", U + "<|Assistant|>\na\n"),
    ("d.chatml", U + "<|eot_id|>\n" + A),
    ("d.chatml", "<|im_start|>usr\nq<|im_end|>\n"),
    ("d.chatml", "<|im_start|>bot\nq<|im_end|>\n"),
    ("d.chatml", OK + "<|tool|>\n{}\n" + A),
    ("d.chatml", U + "<|assistant:contxt|>\na\n" + A),
    ("d.chatml", U + "<|assistant:context|>\na\n"),
    ("d.chatml", U + "<|assistant:context|>\na\n" + A),
    ("d.chatml", "\nBonjour\n" + OK),
    ("d.chatml", " <|user|>\nq\n" + A),
    ("d.chatml", OK + "<|endoftext|> text\n"),
    ("d.chatml", OK + "<|endoftext|>\n" + U),
    ("d.chatml", "<|system|>\nS\n" + A + OK),
    ("d.chatml", U + "<|assistant|>\n\u200b\u2060\ufe0f\n"),
    ("d.chatml", OK + OK + "<|user|>\nq" + " " * 1_000_000 + "q\n" + A),
    ("d.chatml", "<|user|>\nq\n<assistant>\na\n"),
    ("d.chatml", "<|user|>\nWhat is <|eot_id|>?\n"),
    ("d.chatml", "\n \n<|endoftext|>\n\n"),
    ("d.chatml", "<|im_start|>user\nq\n<|im_start|>assistant\na<|im_end|>"),
    ("d.chatml", OK + "<|im_start|>user\nq\n"),
    ("d.chatml", "<|im_start|>user\nq<|im_end|> r\n"),
    ("d.jsonl", row(*QA) + "\n{'messages': []}"),
    ("d.jsonl", "\n[\n" + row(*QA) + "\n" + row(*QA) + "]"),
    ("d.jsonl", json.dumps(json.loads(row(*QA)), indent=1) + "\n{\n'a': 1}"),
    ("d.jsonl", '"text"'),
    ("d.jsonl", '{"messages": {"role": 1}}'),
    ("d.jsonl", '{"messages": ["q"]}'),
    ("d.jsonl", json.dumps({"version": 1, "data": [PROMPT, PROMPT]}, indent=1)),
    ("d.jsonl", '{"question": "q", "answer": "a"}'),
    ("d.jsonl", row(("usr", "q"))),
    ("d.jsonl", row((["user"], "q"))),
    ("d.jsonl", row(QA[0], ("tool", "{}"), QA[1])),
    ("d.jsonl", answer(content=None, tool_calls=[{}])),
    ("d.jsonl", answer(weight=0.5)),
    ("d.jsonl", answer(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])),
    *(("d.jsonl", row(*QA, **{name: False})) for name in ("label", "Image", "history", "loss_mask", "rejected")),
    ("d.jsonl", row(QA[0], chosen=OPENAI[2], rejected=OPENAI[2])),
    ("d.jsonl", json.dumps({"conversations": SHAREGPT[1:], "system": ["S"]})),
    ("d.jsonl", json.dumps({**PROMPT, "prompt": None})),
    ("d.jsonl", row(("user", [{"type": "image"}]))),
    ("d.jsonl", row(("user", [{"type": "text", "text": {"value": "q", "annotations": []}}]))),
    ("d.jsonl", json.dumps({"messages": [{"role": "user", "text": "q"}, OPENAI[2]]})),
    ("d.jsonl", row(("user", "a\ud800b"))),
    ("d.jsonl", row(("user", "a\0b"))),
    ("d.jsonl", row(*QA) + "\n" + row(("user", " "), QA[1])),
    ("d.jsonl", "[]"),
    ("d.jsonl", row(*QA).encode() + b"\n\xe9"),
    ("d.csv", "question,answer\nq,a\n"),
    ("d.csv", "prompt,completion\nq,a\nq,a,b\n"),
    ("d.csv", 'prompt,completion\nq,a\n"q,a\nq,a\n'),
    ("d.csv", "sep=;\nprompt;completion\nq;\n"),
    ("d.csv", "prompt,completion,Prompt\nq,a,r\n"),
    ("d.csv", "prompt,completion\n"),
    ("d.parquet", b"PAR1 ..."),
    ("d.jsonl.gz", b"\x1f\x8b\x08\x00"),
    ("d.docx", b"PK\x03\x04"),
    ("d.db", b"SQLite format 3\0"),
    ("d.jsonl", b"\n<!DOCTYPE html><html>"),
    ("d.chatml", OK.encode("utf-16")),
    ("d.chatml", OK.encode("utf-16-le")),
]  # fmt: skip


@pytest.mark.parametrize("text", ["[" * 100_000, '{"messages": ' + "[" * 100_000, '{"messages": ' + "1" * 5000 + "}"])
def test_json_that_python_refuses(text):
    """Nested too deeply, or a number too long: Python raises no JSONDecodeError, the script prints one line."""
    assert_says(error_of(load, text, "d.jsonl"), "d.jsonl:1")


def test_all_errors_of_the_data_are_listed():
    good, bad = "<|endoftext|>\n" + OK, "<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|usr|>\n"
    write("d", good + bad + good + "<|endoftext|> r\n" + U + good + "<|endoftext|>\n" + A)
    write("e", OK + "\n" + U + "\xff\n" + "<|im_start|>user\nq\n<|im_start|>assistant\na<|im_end|>\n")
    *lines, last = listed("d", "e")
    assert [line.split(": ")[0] for line in lines] == ["d:9", "d:11", "d:17", "d:26", "e:9"]
    assert "5 errors" in last and "--skip-bad" in last
    write("d.jsonl", "\n".join([row(*QA), "{", row(("usr", "q"), ("assistant", 1)), row(*QA)]))
    assert [line.split(": ")[0] for line in listed("d.jsonl")[:2]] == ["d.jsonl:2", "d.jsonl:3"]


def test_equal_errors_are_one_line():
    """--skip-bad is named only where it would leave something; the screen of many errors: test_screens.py."""
    (line,) = listed(write("d.jsonl", '{"question": "q", "answer": "a"}\n' * 30))
    assert line.startswith("d.jsonl:1: ") and "30 times" in line and "--skip-bad" not in line


def test_skip_bad():
    write("d", OK + "<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|endoftext|>\n" + OK.replace("q", "r"))
    counts, (finding,) = survey("d", skip_bad=True)
    assert (counts["conversations"], counts["skipped"]) == (2, 1)
    assert finding[:4] == ("warning", "d", 8, "skipped") and "<|assistant|>" in finding.text
    counts, _ = survey(write("d.jsonl", "\n".join([row(*QA), "{", row(("usr", "q")), row(*QA)])), skip_bad=True)
    assert (counts["conversations"], counts["skipped"]) == (2, 2)
    assert_says(listed(write("d", A), skip_bad=True)[0], "d", "--skip-bad")
    # How many conversations would be lost is not known where a file cannot be read.
    assert_says(listed(write("d", OK.encode() + b"\xe9"), skip_bad=True)[0], "d:5", "0xe9")


def test_no_text_of_a_file_controls_the_terminal():
    """An escape sequence or a direction override in a name is printed as visible text; a long one is cut."""
    tag, shown = "<|\x1b[2Ja\u202e|>", "<|\\x1b[2Ja\\u202e|>"
    assert_says(error_of(load, U + tag), "d.chatml:3", shown, f"\\{shown}")
    for content in (f"<|user|>q {tag}\n" + A, row(("user", tag), QA[1])):
        ((line, kind, text),) = warned(content, "d")
        assert (line, kind) == (1, "tag") and shown in text and tag not in text
    for text in ("<|im_start|>user " + "x" * 10_000_000, "<|im_start|>" + "é" * 1000 + "\n"):
        assert len(error_of(load, text)) < 400
    joined = "می\u200cخواهم 👩\u200d👧 a\u3000b\u00a0!"
    assert sft.escape_controls(joined) == joined
    assert sft.escape_controls("a\u200bb\u2800\u00ad") == r"a\u200bb\u2800\xad"


# ---- warnings ----


@pytest.mark.parametrize(
    "line", ["<| user |>", "<|user |>q", "<user|>", "<|user>", "|user|>", "<| User|>", "<|user q", "user|>", "< |user|>", "<|/user>",
             " <|user", "<user|", "|USER>", "<||user||>", "<｜user｜>", "<user>", "<User> q"],
)  # fmt: skip
def test_what_looks_like_a_tag(line):
    """A line that begins with a misspelt tag is text, but never without a warning."""
    found, ((number, kind, warning),) = read(write("d", f"<|user|>\nq\n{line}\nr\n" + A))
    assert found == [[("user", f"q\n{line}\nr"), QA[1]]]
    assert (number, kind) == (3, "tag") and "<|user|>" in warning
    assert [warning[:2] for warning in warned(f"<|im_start|>user\nq\n{line}<|im_end|>\n" + A)] == [(3, "tag")]


def test_what_does_not_look_like_a_tag():
    lines = ["user", "User: q", "<users>", "| user | nom |", "<|username|", "> user", "users|>", "a <|user>", "<|", "|>", "\\<|user|>",
             "L'user |> x", "system | user", "**user**", "a < user | b", "In HTML <s>a</s>", "<| utilisateur>"]  # fmt: skip
    assert warned("<|user|>\n" + "\n".join(lines) + "\n" + A) == []


def test_what_is_ignored():
    found, warnings = read(write("d", "<|system|>\n\u200b\n" + OK + U))
    assert found == [QA]
    assert [warning[:2] for warning in warnings] == [(1, "empty system"), (7, "no answer")]


@pytest.mark.parametrize("token", ["<|end|>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "</s>", "<end_of_turn>"])
def test_end_tokens_of_other_formats(token):
    """They would be trained as text: a warning in both formats, and an error alone on a line if it looks like a tag."""
    ((line, kind, text),) = warned(U + f"<|assistant|>\na{token}\n")
    assert (line, kind) == (4 if "|" in token else 3, "tag") and token in text and "delete" in text
    ((line, kind, text),) = warned(row(QA[0], ("assistant", "a" + token)), "d.jsonl")
    assert (line, kind) == (1, "tag") and token in text
    if "|" in token:
        assert_says(error_of(load, U + token + "\n" + A), "d.chatml:3", "delete", "\\" + token)


def surveyed(*files: str) -> list[tuple]:
    """[(file, line, kind)] of the warnings that the survey adds, apart from copies."""
    return [finding[1:4] for finding in survey(*files)[1] if finding.kind != "duplicate"]


def test_dialogues_that_nothing_separates():
    assert surveyed(write("d", OK * 12)) == [("d", 1, "several exchanges")]
    assert surveyed(write("e", "\n" + OK * 2)) == [("e", 2, "several exchanges")]
    assert surveyed("d", "e") == [], "a file for each dialogue is a usual layout"
    assert surveyed(write("f", OK + "<|endoftext|>\n" + OK * 30)) == [("f", 6, "several exchanges")]
    assert surveyed(write("g", OK)) == surveyed(write("h", "<|endoftext|>\n".join([OK] * 40))) == []


def test_a_system_turn_that_not_all_conversations_have():
    """Alone in a file it may be meant for all; shared by all it goes into the Modelfile."""
    same, none = "<|system|>\nTu es Dolores.\n" + OK, "<|endoftext|>\n" + OK
    assert surveyed(write("d", same + none * 2)) == [("d", 1, "system")] and surveyed(write("e", same + none)) == []
    assert surveyed(write("d", same * 4)) == [] and survey("d")[0]["system"] == "Tu es Dolores."
    middle = row(*QA, ("system", "S"), *QA)  # in a row, a system turn begins no other conversation
    assert surveyed(write("m.jsonl", "\n".join([middle, row(*QA), row(*QA)]))) == [("m.jsonl", 1, "system")]
    for text in (same + same.replace("Dolores", "Maeve"), none + same, same + none + same):
        assert survey(write("d", text))[0]["system"] is None


# ---- rows ----

LAYOUTS = {
    "OpenAI": ({"messages": OPENAI}, SQA),
    "OpenAI, in parts": ({"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in OPENAI]}, SQA),
    "OpenAI Responses": ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                                       {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]}, QA),
    "ShareGPT": ({"conversations": SHAREGPT}, SQA),
    "prompt": (PROMPT, QA),
    "prompt of messages": ({"prompt": OPENAI[:2], "completion": OPENAI[2:]}, SQA),
    "prompt with system": ({**PROMPT, "system": "S"}, SQA),
    "system twice": ({"messages": OPENAI, "system": " S"}, SQA),
    "system again": ({"messages": [*OPENAI, *OPENAI]}, SQA * 2),
    "developer": ({"messages": [{"role": "developer", "content": "S"}, *OPENAI[1:]]}, SQA),
    "Alpaca": (ALPACA, QA),
    "Alpaca with input": ({**ALPACA, "input": "r"}, [("user", "q\n\nr"), QA[1]]),
    "Alpaca without instruction": ({**ALPACA, "instruction": "", "input": "q"}, QA),
    "Alpaca without input": ({"instruction": "q", "output": "a"}, QA),
    "two layouts": ({"prompt": None, "completion": None, **ALPACA}, QA),
    "tags are text": (json.loads(row(("user", "q\n<|assistant|>\nx"), QA[1])), [("user", "q\n<|assistant|>\nx"), QA[1]]),
}  # fmt: skip


@pytest.mark.parametrize("record, expected", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_rows(record, expected):
    """As JSON lines, a list, indented objects and Parquet, whatever the name of the file."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), "d")
    lines, whole, indented = json.dumps(record), json.dumps([record, record], indent=1), json.dumps(record, indent=1)
    blank = f"\ufeff\r\n{lines}\r\n\r\n{lines}\r\n"
    for content in (lines, blank, whole, indented, f"{indented}\n\ufeff{indented}\n", Path("d").read_bytes()):
        for name in ("d", "d.txt", "d.json", "d.JSONL", "d.chatml"):
            found = load(content, name)
            assert found[0] == expected and set(map(str, found)) == {str(expected)}


def test_rows_of_several_layouts_and_batches():
    assert load("\n".join(map(json.dumps, ({"messages": OPENAI}, {"conversations": SHAREGPT}))), "d") == [SQA, SQA]
    assert load(row(("user", "\ud83d\ude42"), QA[1]), "d") == [[("user", "🙂"), QA[1]]], "a pair of surrogates"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": OPENAI}] * 2500), "d.parquet")
    assert read("d.parquet")[0] == [SQA] * 2500


def test_what_is_not_read_is_counted():
    """Metadata does not keep a row from being read; values that are null or empty count as absent."""
    named = [
        {**OPENAI[1], "name": "Ann", "weight": 1},
        {**OPENAI[2], "refusal": None, "tool_calls": [], "weight": None},
    ]
    parts = [{"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}, "image_url": None}]
    rows = [
        {"messages": named, "id": 7, "system_prompt": "S", "score": 0.5, "images": [], "label": None, "history": ""},
        {"messages": [{"role": "user", "content": parts}, OPENAI[2]], "id": 0, "tools": [{"type": "function"}], "source": ""},
        {**PROMPT, "text": "x", "language": "fr", "metadata": {"a": 1}, "chosen": [], "rejected": {}},
    ]  # fmt: skip
    counts, findings = survey(write("d.jsonl", "\n".join(map(json.dumps, rows))))
    assert counts["conversations"] == 3 and [finding.kind for finding in findings] == ["duplicate", "duplicate"]
    assert counts["not_read"] == {
        "row": {"id": 2, "system_prompt": 1, "score": 1, "tools": 1, "text": 1, "language": 1, "metadata": 1},
        "message": {"name": 1, "weight": 1, "cache_control": 1},
    }


def test_damaged_parquet():
    rows = [json.loads(row(("user", f"q{i}"), ("assistant", "a" * (i + 1)))) for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "d.parquet")
    whole = Path("d.parquet").read_bytes()
    for damaged in (whole[:-100], whole[:500] + b"\xff" * 1500 + whole[2000:]):  # the footer, the pages
        assert_says(error_of(load, damaged, "d.parquet"), "d.parquet")
    buffers = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"q\xed\xa0")
    strings = pyarrow.StringArray.from_buffers(2, *buffers)  # not UTF-8
    table = pyarrow.table({"prompt": strings, "completion": strings})
    pyarrow.parquet.write_table(table, "d.parquet")
    assert_says(error_of(read, "d.parquet"), "d.parquet", "UTF-8")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("excel", [False, True])
def test_csv(delimiter, excel):
    """As Excel writes it: a line `sep=`, CRLF, empty columns and rows."""
    lines = ["Prompt|Completion|note|", "q|a||", '"q, ""r"";\n\ts"|" a\n"|x|', "", "q|a|y|", "|||", "|||"]
    text = "\ufeff" + "\r\n".join(line.replace("|", delimiter) for line in [*["sep=|"] * excel, *lines])
    assert load(text, "d.csv") == [QA, [("user", 'q, "r";\n\ts'), QA[1]], QA]
    assert [c.line - excel for c in sft.read_conversations(["d.csv"], "auto")] == [2, 3, 7]
    assert survey("d.csv")[0]["not_read"]["row"] == {"note": 2}


def test_csv_with_long_texts_and_all_columns():
    long = "a" * 300_000
    expected = [("system", "S"), ("user", "q\n\nr"), ("assistant", long)]
    assert load(f"instruction,input,output,system\nq,r,{long},S\n", "d.csv") == [expected]


def test_quotes_in_a_tsv_are_text():
    """No quote holds lines together where each line is a row; a field that is quoted as a whole loses its quotes."""
    text = 'prompt\tcompletion\nq\t"a\nq\ta\nq\tb"\nq\t"a ""b"" c"\nq\t"a" b\n'
    answers = ['"a', "a", 'b"', 'a "b" c', '"a" b']
    assert load(text, "d.tsv") == [[QA[0], ("assistant", answer)] for answer in answers]


def test_the_first_bytes_and_the_flag_override_the_name():
    assert load(OK, "d.json") == [QA]
    assert read(write("d.chatml", row(*QA)), input_format="messages")[0] == [QA]
    assert_says(error_of(read, write("d.json", OK), input_format="messages"), "d.json:1", "JSON")
    for name, content, kind in (("d", row(*QA), "JSON"), ("d.csv", "q", "CSV"), ("d", b"PAR1", "Parquet")):
        assert_says(error_of(read, write(name, content), input_format="chatml"), name, kind, "--input-format chatml")


# ---- hostile data ----


@pytest.mark.parametrize(
    "hostile", ["a\u202e\u2066abc\u2069", "\x1b[31m", "a\x0b\x0cb", "\ufffe", "\U0010ffff", "a\x85b\u2028c"]
)
def test_hostile_contents_are_unchanged(hostile):
    turns = [("user", hostile), ("assistant", hostile)]
    assert load(f"<|user|>\n{hostile}\n<|assistant|>\n{hostile}") == load(row(*turns), "d.jsonl") == [turns]  # fmt: skip


HOSTILE = {
    "a long line": lambda n: "x" * n,
    "long lines of blanks": lambda n: ("a" + " " * 999_999) * (n // 1_000_000) + "b",
    "empty lines": lambda n: "a" + "\n" * (n // 10) + "b",
    "backslashes": lambda n: "\\" * n,
    "tags that do not close": lambda n: "x" + "<|im_end" * (n // 8) + "<|" * (n // 2),
    "escapes": lambda n: "a\n" + "\\<|im_end|>\n" * (n // 50) + "b",
    "unseen": lambda n: "a\n" + "\u200b" * (n // 3) + "b",
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_size(make):
    """4 MB in one turn, 400,000 empty lines: read as they are in both dialects; quadratic time would take hours."""
    text = make(4_000_000)
    assert load(f"<|im_start|>user\n{text}\n<|im_end|>\n{A}") == [[("user", text.replace("\\<", "<")), QA[1]]]
    assert load(f"<|user|>\n{text}\n{A}") == [[("user", re.sub(r"(?m)^\\<", "<", text)), QA[1]]]


def test_a_million_lines():
    empty = "\n" * 1_000_000
    assert_says(error_of(load, empty + "oops" + empty), "d.chatml:1000001", "<|user|>")
    assert load(empty + row(*QA) + empty, "d.jsonl") == [QA]
    ((user, _),) = load("<|user|>\nq q q q q\n" * 200_000 + A)  # quadratic time would take minutes
    assert user[1] == "\n\n".join(["q q q q q"] * 200_000)


MANY = {
    "empty lines": lambda n: U + "\n" * n + A,
    "escaped lines": lambda n: U + "\\<|user|>\n" * n + A,
    "tags in lines": lambda n: U + "x <|eot_id|>\n" * n + A,
    "escapes in a line": lambda n: "<|im_start|>user\n" + "\\<|im_end|>" * n + "<|im_end|>\n" + A,
    "one role's turns": lambda n: U * n + A,
    "exchanges": lambda n: (U + A) * n,
    "conversations": lambda n: ("<|endoftext|>\n" + U + A) * n,
    "objects": lambda n: json.dumps(json.loads(row(*QA, id=1)), indent=0) * n,
}


@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
def test_work_grows_with_the_file(make):
    """Calls of Python and C functions in the survey: at most twice as many for twice the file."""

    def calls(n: int) -> int:
        count, file = 0, write("d", make(n))

        def one(frame, event, _):
            nonlocal count
            count += event.endswith("call")

        sys.setprofile(one)
        try:
            survey(file)
        finally:
            sys.setprofile(None)
        return count

    calls(1)  # compiles the regular expressions
    fewer, more, most = calls(500), calls(1000), calls(2000)
    assert most - more <= 2.01 * (more - fewer) + 10


TEXT = [*(f"<|{name}|>" for name in ("system", "user", "assistant", "endoftext", "im_end", "usr")), "\n", "\r\n", "\r", "q", " ",
        "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>", "\\<|user|>", "\\", "\0", "\ufeff", "\u200b", "é"]  # fmt: skip
KEYS = ("role", "content", "from", "value", "type", "text", "messages", "weight", "loss", "system", "prompt", "completion",
        "instruction", "input", "output", "tools", "tool_calls", "label", "name")  # fmt: skip
WORDS = st.sampled_from(["user", "gpt", "system", "x", "", "\ud800", "\0"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.fixed_dictionaries({"messages": st.lists(JSON, max_size=3)}) | JSON, max_size=3)


@fuzz
@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from(TEXT), max_size=25).map("".join)
    | ROWS.map(json.dumps)
    | ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)))
)
@example(b'[{"messages": [{"role": {}, "content": "q"}]}]')
def test_any_bytes(content):
    """One line about an error, or sound conversations: only known roles, in turn, with stripped contents."""
    write("any", content)
    for input_format in ("chatml", "messages", "auto"):
        try:
            conversations = read("any", input_format=input_format)[0]
        except sft.InputError as error:
            assert re.fullmatch(r"any(:\d+)?: [^;\n]+; [^\n]+", str(error))
            continue
        for turns in conversations:
            roles = [role for role, _ in turns]
            assert set(roles) <= set(sft.ROLES) and roles[-1] == "assistant"
            assert next(role for role in roles if role != "system") == "user"
            assert all(one != other for one, other in pairwise(roles))
            assert all(content and content == content.strip() for _, content in turns)
