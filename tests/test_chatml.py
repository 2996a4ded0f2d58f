"""Text -> turns: both ChatML dialects and `messages` data, the place of each error, hostile data."""

import contextlib
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

OK = "<|user|>\nq\n<|assistant|>\na\n"
QA = [("user", "q"), ("assistant", "a")]
fuzz = settings(deadline=None, database=None, max_examples=150)


def write(file: str, content) -> str:
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(*files: str, input_format="chatml"):
    """[[(role, content)]] of each conversation, and the warnings as [(line, kind, text)]; InputError for an error."""
    conversations, warned = [], []
    for conversation in sft.read_conversations(list(files), input_format):
        for level, file, line, kind, text in conversation.findings:
            assert file in files
            if level == "error":
                raise sft.InputError(f"{file}:{line}: {text}")
            warned += [(line, kind, text)] if level == "warning" else []
        conversations.append([(turn.role, turn.content) for turn in conversation.turns])
    return conversations, warned


def chatml(content):
    return read(write("d.chatml", content))[0]


def messages(content, file="d.jsonl"):
    return read(write(file, content), input_format="messages")[0]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Messages name files as the user gave them: short names, when the test works in their folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


# ---- the two dialects ----


@pytest.mark.parametrize(
    "text, expected",
    {
        "next line": ("<|user|>\nq\n<|assistant|>\na\n", [QA]),
        "same line": ("<|user|>q\n<|assistant|> a", [QA]),
        "both": ("<|user|> q\nr\n<|assistant|>\na\n\n b", [[("user", "q\nr"), ("assistant", "a\n\n b")]]),
        "edges stripped": ("\n\n<|user|>\n\n \tq \n\n<|assistant|>\n\u00a0a\u2028\n", [QA]),
        "inner white space kept": ("<|user|>\nq\n<|assistant|>\na  \n\n\n\tb", [[QA[0], ("assistant", "a  \n\n\n\tb")]]),
        "tag inside a line": ("<|user|>\nq <|assistant|>\n<|assistant|>\na", [[("user", "q <|assistant|>"), QA[1]]]),
        "no tag": ("<|user|>\n<|a b|> <||> <|é|\n<|assistant|>\na", [[("user", "<|a b|> <||> <|é|"), QA[1]]]),
        "im": ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n", [QA]),
        "im, end on its line": ("<|im_start|> user \nq\n<|im_end|>\n\n<|im_start|>assistant\n\na\n<|im_end|>", [QA]),
        "im, tags are text": (
            "<|im_start|>user\n<|user|>\n<|endoftext|>\n<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
            [[("user", "<|user|>\n<|endoftext|>"), QA[1]]],
        ),
        "dialects mixed": ("<|user|>\nq\n<|im_start|>assistant\na<|im_end|>\n<|endoftext|>\n" + OK, [QA, QA]),
        "neighbours joined": ("<|user|>\nq\n<|user|>\nr\n<|assistant|>a\n<|assistant|>b", [[("user", "q\n\nr"), ("assistant", "a\n\nb")]]),
        "BOM": ("\ufeff" + OK, [QA]),
        "BOM elsewhere is text": ("<|user|>\n\ufeffq\n<|assistant|>\na", [[("user", "\ufeffq"), QA[1]]]),
        "CRLF": ("<|user|>\r\nq\r\nr\r\n<|assistant|>\r\na\r\n<|endoftext|>\r\n", [[("user", "q\nr"), QA[1]]]),
        "no end of line": (OK.rstrip(), [QA]),
    }.values(),
)  # fmt: skip
def test_chatml(text, expected):
    assert chatml(text) == expected


def test_where_a_conversation_starts():
    one, two = "<|system|>\nS\n" + OK, OK.replace("q", "r")
    system = ("system", "S")
    assert chatml(OK + two) == [[*QA, ("user", "r"), ("assistant", "a")]]
    assert chatml(OK + one + one) == [QA, [system, *QA], [system, *QA]]
    assert chatml(OK + "<|endoftext|>\n\n" + OK + "<|endoftext|>\n<|endoftext|>\n") == [QA, QA]
    assert (
        chatml("<|im_start|>system\nS<|im_end|>\n" + OK + "<|im_start|>system\nS<|im_end|>\n" + OK)
        == [[system, *QA]] * 2
    )


def test_line_numbers():
    write("d.chatml", "\n<|user|>\nq\n<|assistant|>\na\n<|endoftext|>\n\n<|system|>\nS\n\n" + OK)
    one, two = sft.read_conversations(["d.chatml"], "chatml")
    assert (one.file, one.line, [turn.line for turn in one.turns]) == ("d.chatml", 2, [2, 4])
    assert (two.file, two.line, [turn.line for turn in two.turns]) == ("d.chatml", 8, [8, 11, 13])


def test_escapes():
    text = "<|user|>\n{}\n<|assistant|>\na"
    for written, meant in {
        r"\<|user|>": "<|user|>",
        r"\\<|user|>": r"\<|user|>",
        r"\<|endoftext|> x": "<|endoftext|> x",
        r"\<|nonsense|>": "<|nonsense|>",
        r"x \<|user|>": r"x \<|user|>",
        r"\n <|user": r"\n <|user",
    }.items():
        assert chatml(text.format("q\n" + written)) == [[("user", "q\n" + meant), QA[1]]]
    text = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    for written, meant in {
        r"\<|im_end|>": "<|im_end|>",
        r"x\<|im_end|>y\\<|im_end|>": r"x<|im_end|>y\<|im_end|>",
        r"\<|im_start|>user": "<|im_start|>user",
        r"\\<|im_start|>user": r"\<|im_start|>user",
        r"x \<|im_start|>": r"x \<|im_start|>",
        r"\<|user|>": r"\<|user|>",
        r"\\<|im_end|>\<|im_end|>": r"\<|im_end|><|im_end|>",
    }.items():
        assert chatml(text.format(written)) == [[("user", meant), QA[1]]]


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
def test_any_contents_can_be_written_and_read(tmp_path_factory, data, im, crlf):
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
    file = str(tmp_path_factory.getbasetemp() / "fuzz.chatml")
    write(file, "\n".join(lines).replace("\n", "\r\n" if crlf else "\n"))
    assert read(file)[0] == [as_turns(chat) for chat in data]


# ---- files ----


def test_several_files_and_globs():
    for name, q in {
        "b.chatml": "1",
        "a.chatml": "2",
        "sub/c.chatml": "3",
        "x [1].chatml": "4",
        "x 1.chatml": "5",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        write(name, OK.replace("q", q))

    def asked(*patterns) -> list[str]:
        """What the user says in each conversation of the files that match."""
        return [conversation[0][1] for conversation in read(*sft.find_files(list(patterns)))[0]]

    assert asked("b.chatml", "a.chatml") == ["1", "2"]
    assert asked("[ab].chatml", "b.chatml") == ["2", "1"]
    assert asked("**/*.chatml") == ["2", "1", "3", "5", "4"]
    assert asked("x [1].chatml") == ["4"], "the name of an existing file is not a glob"


def test_missing_and_empty_files():
    write("empty", b"")
    for name in ("nô.chatml", "*.chatml", ".", "empty"):
        assert_says(error_of(sft.find_files, [name]), name)


@contextlib.contextmanager
def as_nobody():
    """Become another user where these tests run as root, who may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["d.chatml", "d.jsonl", "d.parquet"])
def test_a_file_without_read_permission(name, tmp_path, monkeypatch, capsys):
    os.chmod(tmp_path, 0o755)
    write(name, OK)
    os.chmod(name, 0)
    monkeypatch.setattr(sys, "argv", ["train_sft_dolores.py", "--dry-run", "--train-files", name])
    with as_nobody(), pytest.raises(SystemExit) as ended:
        sft.main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_says(err, name, "Permission denied")


# ---- errors: place and fact here, the whole line in tests/screens/errors.txt ----

U, A = "<|user|>\nq\n", "<|assistant|>\na\n"
CHATML_ERRORS = [  # (text, place, a fact in the message)
    (OK.encode() + b"<|user|>\ncaf\xe9\n", "d.chatml:6", "0xe9"),
    (OK.encode("utf-16"), "d.chatml", "UTF-16"),
    (U.encode() + b"\xed\xa0\x80", "d.chatml:3", "0xed"),
    (U + "<|assitant|>\na\n", "d.chatml:3", "<|assistant|>"),
    (U + "<|Assistant|>\na\n", "d.chatml:3", "<|assistant|>"),
    (U + "<|eot_id|>\n" + A, "d.chatml:3", "\\<|eot_id|>"),
    ("<|im_start|>usr\nq<|im_end|>\n", "d.chatml:1", "user"),
    ("<|im_start|>bot\nq<|im_end|>\n", "d.chatml:1", "system, developer, user, assistant, assistant:context"),
    ("<|im_start|>tool\nq<|im_end|>\n" + OK, "d.chatml:1", "tool"),
    (U + A + "<|tool|>\n{}\n" + A, "d.chatml:5", "tool"),
    (U + "<|assistant:contxt|>\na\n" + A, "d.chatml:3", "<|assistant:context|>"),
    (U + "<|assistant:context|>\na\n", "d.chatml:1", "only context"),
    (U + "<|assistant:context|>\na\n" + A, "d.chatml:5", "only context"),
    ("\nBonjour\n" + OK, "d.chatml:2", "<|user|>"),
    (" <|user|>\nq\n" + A, "d.chatml:1", "<|user|>"),
    (OK + "<|endoftext|>\ntext\n", "d.chatml:6", "<|user|>"),
    (OK + "<|endoftext|> text\n", "d.chatml:5", "<|endoftext|>"),
    (OK + "<|endoftext|>\n" + U, "d.chatml:6", "assistant"),
    ("<|system|>\nS\n<|system|>\nS\n" + OK, "d.chatml:1", "assistant"),
    (A, "d.chatml:1", "user"),
    ("<|system|>\nS\n" + A + OK, "d.chatml:3", "user"),
    (U + "<|assistant|>\n \n\t\n" + U + A, "d.chatml:3", "empty assistant"),
    ("<|user|>\n\n" + A, "d.chatml:1", "empty user"),
    ("\ufeff", "d.chatml", "README"),
    ("\n \n<|endoftext|>\n\n", "d.chatml", "README"),
    ("<|im_start|>user\nq\n<|im_start|>assistant\na<|im_end|>", "d.chatml:1", "<|im_end|>"),
    (OK + "<|im_start|>user\nq\n", "d.chatml:5", "<|im_end|>"),
    ("<|im_start|>user\nq<|im_end|> r\n", "d.chatml:2", "<|im_end|>"),
]


def test_system_has_a_second_name():
    assert chatml("<|developer|>\nS\n" + OK) == messages(row(("developer", "S"), *QA)) == [[("system", "S"), *QA]]


def trained_answers(*files, input_format):
    """[(content, trained)] of all answers."""
    found = sft.read_conversations(files, input_format)
    return [(turn.content, turn.trained) for c in found for turn in c.turns if turn.role == "assistant"]


def test_answers_that_are_only_context():
    write("d", U + "<|assistant:context|> a\n" + U + "<|assistant|>\nb\n")
    write("im", U + "<|im_start|>assistant:context\na<|im_end|>\n" + U + "<|im_start|>assistant\nb<|im_end|>\n")
    weights = [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "weight": 1}]
    write("m", json.dumps({"messages": [OPENAI[1], weights[0], OPENAI[1], weights[1]]}))
    expected = [("a", False), ("b", True)]
    assert trained_answers("d", input_format="chatml") == trained_answers("im", input_format="chatml") == expected
    assert trained_answers("m", input_format="messages") == expected
    (other,) = sft.read_conversations(["d"], "chatml")
    plain = other.turns[1]._replace(trained=True)
    assert sft.digest(other.turns) != sft.digest([other.turns[0], plain, *other.turns[2:]])


# ---- all errors at once ----


def survey(*files, input_format="chatml", skip_bad=False) -> tuple[dict, list]:
    """(counts, warnings) of these files."""
    args = arguments("--input-format", input_format, *["--skip-bad"] * skip_bad)
    return sft.read_data(sft.find_files(list(files)), args)[:2]


def listed(skip_bad=False) -> list[str]:
    """The lines of the error that the survey of the file d raises."""
    return error_of(survey, "d", skip_bad=skip_bad).split("\n")


def test_all_errors_of_the_data_are_listed():
    good, bad = "<|endoftext|>\n" + OK, "<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|usr|>\n"
    write("d", good + bad + good + "<|endoftext|> r\n" + U + good + "<|endoftext|>\n" + A)
    write("e", OK + "\n" + U + "\xff\n" + "<|im_start|>user\nq\n<|im_start|>assistant\na<|im_end|>\n")
    lines = error_of(survey, "d", "e").split("\n")
    places = [line.split(": ")[0] for line in lines]
    assert places[:5] == ["d:9", "d:11", "d:17", "d:26", "e:9"] and len(lines) == 6
    assert "5 errors" in lines[5] and "--skip-bad" in lines[5]
    write("d", "<|endoftext|>\n" + OK + "".join(bad.replace("usr", f"r{i}") for i in range(30)))
    lines = listed()
    assert len(lines) == 21 and all(re.match(r"d:\d+: ", line) for line in lines[:20]) and "11 more" in lines[20]
    assert lines[0].endswith(" (30 times)") and "60 errors" in lines[20] and "--skip-bad" in lines[20]
    write("d", bad)
    assert len(listed()) == 2, "--skip-bad would leave nothing"


def test_an_unknown_role_does_not_hide_the_next():
    write("d", "<|im_start|>usr q<|im_end|>\n<|usr|>\n<|im_start|>usr\n<|usr|>\n")
    assert [line.split(": ")[0] for line in listed()[:4]] == ["d:1", "d:2", "d:3", "d:3"]


def test_skip_bad():
    write("d", OK + "<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|endoftext|>\n" + OK.replace("q", "r"))
    found, warned = survey("d", skip_bad=True)
    assert (found["conversations"], found["skipped"]) == (2, 1)
    ((level, file, line, kind, text),) = warned
    assert (level, file, line, kind) == ("warning", "d", 8, "skipped") and "<|assistant|>" in text
    write("d", A)
    assert_says(listed(skip_bad=True)[0], "d", "--skip-bad")


def test_what_cannot_be_read_is_not_skipped():
    """How many conversations would be lost is not known."""
    write("d", OK.encode() + b"\xe9")
    assert_says(listed(skip_bad=True)[0], "d:5", "0xe9")
    write("d", OK + "<|user|>\n" + A), write("e", b"\xe9")
    lines = error_of(survey, "e", "d").split("\n")
    assert [line.split(": ")[0] for line in lines] == ["e:1", "d:5"]


def test_more_blanks_than_a_tokenizer_accepts():
    for blanks in (" " * 999_999, "\n" * 1_000_001, (" " * 999_999 + "\n") * 2):
        assert survey(write("d", f"<|user|>\nq{blanks}q\n" + A))[0]["conversations"] == 1
    write("d", OK + U + A + "<|user|>\nq" + "\t " * 500_000 + "q\n" + A)
    assert_says(listed()[0], "d:9", "million")


def test_a_bad_row_does_not_hide_the_next():
    write("d.jsonl", "\n".join([row(*QA), "{", row(("usr", "q"), ("assistant", 1)), row(*QA)]))
    lines = error_of(survey, "d.jsonl", input_format="messages").split("\n")
    assert [line.split(": ")[0] for line in lines[:3]] == ["d.jsonl:2", "d.jsonl:3", "d.jsonl:3"] and len(lines) == 4
    found, _ = survey("d.jsonl", input_format="messages", skip_bad=True)
    assert (found["conversations"], found["skipped"]) == (2, 2)


@pytest.mark.parametrize("text, place, fact", CHATML_ERRORS)
def test_chatml_errors(text, place, fact):
    assert_says(error_of(chatml, text), place, fact)


def test_an_error_in_the_second_file():
    write("one", OK), write("two", A)
    assert_says(error_of(read, "one", "two"), "two:1", "assistant")


def test_errors_stay_short():
    """A role of 10 MB is not printed in full."""
    for text in ("<|im_start|>user " + "x" * 10_000_000, "<|im_start|>" + "é" * 1000 + "\n"):
        assert len(error_of(chatml, text)) < 400


def test_no_text_of_a_file_controls_the_terminal():
    """An escape sequence or a direction override in a tag's name is printed as visible text."""
    tag, shown = "<|\x1b[2Ja\u202e|>", "<|\\x1b[2Ja\\u202e|>"
    error = error_of(chatml, U + tag)
    assert_says(error, "d.chatml:3", shown, f"\\{shown}")
    write("c", f"<|user|>q {tag}\n" + A)
    write("m", row(("user", tag), QA[1]))
    for warnings in (read("c")[1], read("m", input_format="messages")[1]):
        ((line, kind, text),) = warnings
        assert (line, kind) == (1, "tag") and shown in text and tag not in text


@pytest.mark.parametrize(
    "line", ["<| user |>", "<|user |>q", "<user|>", "<|user>", "|user|>", "<| User|>", "<|user q", "user|>", "< |user|>", "<|/user>",
             " <|user", "<user|", "|USER>", "<||user||>", "<｜user｜>", "<user>", "<User> q"],
)  # fmt: skip
def test_what_looks_like_a_tag(line):
    """A line that begins with a misspelt tag is text, but never without a warning."""
    found, ((number, kind, warning),) = read(write("d", f"<|user|>\nq\n{line}\nr\n" + A))
    assert found == [[("user", f"q\n{line}\nr"), QA[1]]]
    assert (number, kind) == (3, "tag") and "<|user|>" in warning
    im = f"<|im_start|>user\nq\n{line}<|im_end|>\n" + A
    assert [warning[:2] for warning in read(write("d", im))[1]] == [(3, "tag")]


def test_what_does_not_look_like_a_tag():
    lines = ["user", "User: q", "<users>", "| user | nom |", "<|username|", "> user", "users|>", "a <|user>", "<|", "|>", "\\<|user|>",
             "L'user |> x", "system | user", "**user**", "a < user | b"]  # fmt: skip
    assert read(write("d", "<|user|>\n" + "\n".join(lines) + "\n" + A))[1] == []
    corpus = Path(sft.__file__).with_name("train.chatml").read_text(encoding="utf-8")
    assert read(write("d", corpus))[1] == []


def test_warnings():
    found, warnings = read(write("d", "<|system|>\n\n" + OK + U))
    assert found == [QA]
    assert [warning[:2] for warning in warnings] == [(1, "empty system"), (7, "no answer")]


def warned(text: str) -> list[tuple]:
    """[(line, kind, text)] of the warnings of a ChatML file."""
    return read(write("d", text))[1]


FOREIGN = ["<|end|>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "</s>", "<end_of_turn>"]


@pytest.mark.parametrize("token", FOREIGN)
def test_end_tokens_of_other_formats(token):
    """They would be trained as text: a warning in both formats, and an error alone on a line if it looks like a tag."""
    ((line, kind, text),) = warned(U + f"<|assistant|>\na{token}\n")
    assert (line, kind) == (4 if "|" in token else 3, "end token") and token in text and "delete" in text
    ((line, kind, text),) = read(write("m", row(QA[0], ("assistant", "a" + token))), input_format="messages")[1]
    assert (line, kind) == (1, "end token") and token in text
    if "|" in token:
        assert_says(error_of(chatml, U + token + "\n" + A), "d.chatml:3", "delete", "\\" + token)
    assert warned(U + "<|assistant|>\nIn HTML <s>a</s> is struck out.") == []


def test_a_separator_at_the_end_of_a_line():
    ((line, kind, text),) = warned(U + "<|assistant|>\na<|endoftext|>\n" + OK)
    assert (line, kind) == (4, "separator") and "line" in text
    ((line, kind, text),) = read(write("m", row(QA[0], ("assistant", "a<|endoftext|>"))), input_format="messages")[1]
    assert (line, kind) == (1, "end token")


def surveyed(*files: str) -> list[tuple]:
    """[(file, line, kind)] of the warnings that the survey adds, apart from copies."""
    warnings = survey(*files, input_format="auto")[1]
    return [(w.file, w.line, w.kind) for w in warnings if w.kind != "duplicate"]


def test_dialogues_that_nothing_separates():
    write("d", OK * 12)
    (warning,) = survey("d", input_format="auto")[1]
    assert warning.text.startswith("12 exchanges are one conversation") and "<|endoftext|>" in warning.text
    assert surveyed("d") == [("d", 1, "several exchanges")]
    assert surveyed(write("e", "\n" + OK * 2)) == [("e", 2, "several exchanges")]
    assert surveyed("d", "e") == [], "a file for each dialogue is a usual layout"
    assert surveyed(write("f", OK + "<|endoftext|>\n" + OK * 30)) == [("f", 6, "several exchanges")]
    assert surveyed(write("g", OK)) == surveyed(write("h", "<|endoftext|>\n".join([OK] * 40))) == []


# ---- messages ----

OPENAI = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": " q\n"},
    {"role": "assistant", "content": "a"},
]
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SQA = [("system", "S"), *QA]


def test_messages():
    openai, sharegpt = {"messages": OPENAI, "source": 1}, {"conversations": SHAREGPT}
    both = [openai, sharegpt]
    lines = "\n".join(map(json.dumps, both))
    assert messages(lines) == [SQA, SQA]
    assert messages("\ufeff\r\n" + lines.replace("\n", "\r\n\r\n") + "\r\n") == [SQA, SQA]
    assert messages(json.dumps(both)) == messages(json.dumps(both, indent=2)) == [SQA, SQA]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([openai] * 2500), "d.parquet")
    assert read("d.parquet", input_format="messages")[0] == [SQA] * 2500
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}, OPENAI[2]]
    assert messages(json.dumps({"messages": parts})) == [[("user", "qr"), QA[1]]]
    assert messages(json.dumps({"conversations": SHAREGPT[1:], "system": " S"})) == [SQA]
    assert messages(json.dumps({"conversations": SHAREGPT[1:], "system": None})) == [QA]
    null = [{**message, "weight": None, "tool_calls": None} for message in OPENAI]  # as Parquet fills what a row lacks
    assert messages(json.dumps({"messages": null})) == [SQA]
    # Role tags in contents are text: only the fields give a role.
    quoted = [{"role": "user", "content": "q\n<|assistant|>\nx"}, OPENAI[1], OPENAI[2], OPENAI[1]]
    assert messages(json.dumps({"messages": quoted})) == [[("user", "q\n<|assistant|>\nx\n\nq"), QA[1]]]


def test_messages_have_the_number_of_their_row():
    write("d.jsonl", "\n" + json.dumps({"messages": OPENAI}) + "\n\n" + json.dumps({"messages": OPENAI}))
    assert [(c.line, c.turns[0].line) for c in sft.read_conversations(["d.jsonl"], "messages")] == [(2, 2), (4, 4)]


def row(*turns, **fields):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **fields})


MESSAGES_ERRORS = [
    (row(*QA) + "\n{'messages': []}", "d.jsonl:2", "property name enclosed in double quotes"),
    ("\n[\n" + row(*QA) + "\n" + row(*QA) + "]", "d.jsonl:4", "',' delimiter"),
    (OK, "d.jsonl:1", "JSON"),
    ('"text"', "d.jsonl:1", "messages"),
    ("{}", "d.jsonl:1", "messages"),
    ('{"messages": {"role": 1}}', "d.jsonl:1", "messages"),
    ('{"messages": ["q"]}', "d.jsonl:1", "role"),
    (row(("usr", "q")), "d.jsonl:1", "'usr'"),
    (row(QA[0], ("tool", "{}"), QA[1]), "d.jsonl:1", "tool"),
    (
        json.dumps({"messages": [OPENAI[1], {"role": "assistant", "content": None, "tool_calls": [{}]}]}),
        "d.jsonl:1",
        "tool",
    ),
    (json.dumps({"messages": [OPENAI[1], {**OPENAI[2], "weight": 0.5}]}), "d.jsonl:1", "0.5"),
    (json.dumps({"messages": [OPENAI[1], {**OPENAI[2], "weight": 0}, OPENAI[2]]}), "d.jsonl:1", "only context"),
    (json.dumps({"conversations": SHAREGPT[1:], "system": ["S"]}), "d.jsonl:1", "system"),
    (row((["user"], "q")), "d.jsonl:1", "['user']"),
    (row((None, "q")), "d.jsonl:1", "None"),
    (row(("user", None)), "d.jsonl:1", "user"),
    (row(("user", [{"type": "image"}])), "d.jsonl:1", "user"),
    (row(("user", "a\ud800b")), "d.jsonl:1", "surrogate"),
    (row(*QA) + "\n" + row(("user", " "), QA[1]), "d.jsonl:2", "empty user"),
    (row(QA[0]), "d.jsonl:1", "assistant"),
    (row(QA[1]), "d.jsonl:1", "user"),
    ("\n\n", "d.jsonl", "README"),
    ("[]", "d.jsonl", "README"),
    (row(*QA).encode("latin-1") + b"\n\xe9", "d.jsonl:2", "0xe9"),
]


@pytest.mark.parametrize("text, place, fact", MESSAGES_ERRORS)
def test_messages_errors(text, place, fact):
    assert_says(error_of(messages, text), place, fact)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"messages": ' + "[" * 100_000, '{"messages": ' + "1" * 5000 + "}"])
def test_json_that_python_refuses(text):
    """Nested too deeply, or a number too long: Python raises no JSONDecodeError, the script prints one line."""
    assert_says(error_of(messages, text), "d.jsonl:1")


def test_a_pair_of_surrogates_is_a_character():
    assert messages(
        '{"messages": [{"role":"user","content":"\\ud83d\\ude42"},{"role":"assistant","content":"a"}]}'
    ) == [[("user", "🙂"), QA[1]]]


def test_damaged_parquet():
    assert_says(error_of(messages, OK, "d.parquet"), "d.parquet", "Parquet")
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * i}]}
        for i in range(500)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "d.parquet")
    whole = Path("d.parquet").read_bytes()
    assert_says(error_of(messages, whole[:-100], "d.parquet"), "d.parquet", "Parquet")
    damaged = whole[:500] + b"\xff" * 1500 + whole[2000:]  # the pages, not the footer
    assert_says(error_of(messages, damaged, "d.parquet"), "d.parquet")


def test_parquet_with_text_that_is_not_utf8():
    strings = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"q\xed\xa0")
    )
    turn = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "assistant"]), strings], ["role", "content"])
    table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays(pyarrow.array([0, 2], pyarrow.int32()), turn)})
    pyarrow.parquet.write_table(table, "d.parquet")
    assert_says(error_of(read, "d.parquet", input_format="messages"), "d.parquet", "UTF-8")


# ---- formats are detected ----

PROMPT = {"prompt": "q", "completion": " a"}
ALPACA = {"instruction": "q", "input": "", "output": "a"}
LAYOUTS = {
    "OpenAI": ({"messages": OPENAI}, SQA),
    "ShareGPT": ({"conversations": SHAREGPT}, SQA),
    "prompt": (PROMPT, QA),
    "prompt of messages": ({"prompt": OPENAI[:2], "completion": OPENAI[2:]}, SQA),
    "prompt with system": ({**PROMPT, "system": "S"}, SQA),
    "Alpaca": (ALPACA, QA),
    "Alpaca with input": ({**ALPACA, "input": "r", "text": "x"}, [("user", "q\n\nr"), QA[1]]),
    "Alpaca without input": ({"instruction": "q", "output": "a"}, QA),
}


@pytest.mark.parametrize("record, expected", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_rows(record, expected):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), "d")
    for content in (json.dumps(record), json.dumps([record, record], indent=1), Path("d").read_bytes()):
        for name in ("d", "d.txt", "d.json", "d.JSONL", "d.chatml"):
            found, warnings = read(write(name, content), input_format="auto")
            assert found[0] == expected and set(map(str, found)) == {str(expected)} and not warnings


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(delimiter):
    lines = ["Prompt|Completion|note", "q|a|", '"q, ""r"";\n\ts"|" a\n"|x', "", "q|a|y"]
    text = "\ufeff" + "\r\n".join(line.replace("|", delimiter) for line in lines)
    file = write("d.csv", text)
    assert read(file, input_format="auto")[0] == [QA, [("user", 'q, "r";\n\ts'), QA[1]], QA]
    assert [c.line for c in sft.read_conversations([file], "auto")] == [2, 3, 7]
    write("d.csv", "instruction,input,output,system\nq,r,a,S\n")
    assert read(file, input_format="auto")[0] == [[("system", "S"), ("user", "q\n\nr"), QA[1]]]
    write("d.csv", "prompt,completion\nq," + "a" * 300_000)
    assert read(file, input_format="auto")[0] == [[QA[0], ("assistant", "a" * 300_000)]]


AUTO_ERRORS = [  # (name, content, place, facts)
    ("d.csv", "question,answer\nq,a\n", "d.csv:1", ("question,answer", "prompt")),
    ("d.csv", "prompt,completion\nq,a\nq,a,b\n", "d.csv:3", ("3 fields", "2")),
    ("d.csv", 'prompt,completion\nq,a\n"q,a\nq,a\n', "d.csv:3", ("CSV",)),
    ("d.csv", "prompt,completion\nq,\n", "d.csv:2", ("empty assistant",)),
    ("d.csv", "prompt,completion\n", "d.csv", ("README",)),
    ("d.jsonl", '{"question": "q", "answer": "a"}', "d.jsonl:1", ("question, answer", "prompt")),
    ("d.jsonl", json.dumps({**ALPACA, "history": [["q", "a"]]}), "d.jsonl:1", ("history",)),
    ("d.jsonl", json.dumps({**PROMPT, "prompt": None}), "d.jsonl:1", ("user",)),
    ("d.jsonl", json.dumps({**ALPACA, "input": 1}), "d.jsonl:1", ("user",)),
    ("d.txt", "Bonjour\n" + OK, "d.txt:1", ("<|user|>",)),
    ("d.parquet", b"PAR1 ...", "d.parquet", ("Parquet",)),
    ("mes données.txt", "<|user|>\nÉté à la mer ?\n".encode("cp1252"), "mes données.txt:2", ("0xc9", "UTF-8")),
    ("d.jsonl", row(("user", "é"), QA[1]).encode("utf-16"), "d.jsonl", ("UTF-16",)),
    ("d.chatml", OK.encode("utf-16-le"), "d.chatml:1", ("NUL", "UTF-8")),
]  # fmt: skip


@pytest.mark.parametrize("name, content, place, facts", AUTO_ERRORS)
def test_errors_of_detected_formats(name, content, place, facts):
    assert_says(error_of(read, write(name, content), input_format="auto"), place, *facts)


def test_the_flag_overrides():
    assert messages(row(*QA), "d.chatml") == [QA]
    assert_says(error_of(messages, OK, "d.json"), "d.json:1", "JSON")
    for name, content, kind in (("d", row(*QA), "JSON"), ("d.csv", "q", "CSV"), ("d", b"PAR1", "Parquet")):
        assert_says(error_of(read, write(name, content)), name, kind, "--input-format chatml")


def test_a_folder_means_its_data_files():
    for name in ("x/b.chatml", "x/a.JSONL", "x/c.csv", "x/notes.md", "x/.hidden.txt", "x/sub/d.chatml", "empty/x.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write(name, "x")
    assert list(sft.find_files(["x"])) == list(sft.find_files(["x/"])) == ["x/a.JSONL", "x/b.chatml", "x/c.csv"]
    assert list(sft.find_files(["x/c.csv", "x", "x/s*"])) == ["x/c.csv", "x/a.JSONL", "x/b.chatml", "x/sub/d.chatml"]
    assert_says(error_of(sft.find_files, ["empty"]), "empty", ".jsonl")


# ---- hostile data ----


def test_hostile_contents_are_unchanged():
    for hostile in (
        "\u202e\u2066abc\u2069",
        "\x1b[31m",
        "a\x0b\x0cb",
        "\ufffe",
        "\U0010ffff",
        "a\x85b\u2028c",
    ):
        assert chatml(f"<|user|>\n{hostile}\n<|assistant|>\n{hostile}") == [[("user", hostile), ("assistant", hostile)]]
        assert messages(row(("user", hostile), ("assistant", hostile))) == [[("user", hostile), ("assistant", hostile)]]


HOSTILE = {
    "a long line": lambda n: "x" * n,
    "a long line of blanks": lambda n: ("a" + " " * 999_999) * (n // 1_000_000) + "b",
    "empty lines": lambda n: "a" + "\n" * (n // 10) + "b",
    "backslashes": lambda n: "\\" * n,
    "tags that do not close": lambda n: "x" + "<|im_end" * (n // 8) + "<|" * (n // 2),
    "escapes": lambda n: "a\n" + "\\<|im_end|>\n" * (n // 50) + "b",
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_size(make):
    """10 MB in one turn, a million empty lines: read as they are in both dialects; quadratic time would take days."""
    text = make(10_000_000)
    assert chatml(f"<|im_start|>user\n{text}\n<|im_end|>\n{A}") == [[("user", text.replace("\\<", "<")), QA[1]]]
    assert chatml(f"<|user|>\n{text}\n{A}") == [[("user", re.sub(r"(?m)^\\<", "<", text)), QA[1]]]


def test_a_million_empty_lines():
    empty = "\n" * 1_000_000
    assert chatml(empty + U + empty + A + empty) == [QA]
    assert_says(error_of(chatml, empty + "oops" + empty), "d.chatml:1000001", "<|user|>")
    assert_says(error_of(chatml, empty), "d.chatml", "README")
    assert messages(empty + row(*QA) + empty) == [QA]


def test_many_neighbours_are_joined():
    """A copy at each join would move terabytes and never end."""
    ((user, _),) = chatml("<|user|>\nq q q q q\n" * 500_000 + A)
    assert user[1] == "\n\n".join(["q q q q q"] * 500_000)


MANY = {
    "empty lines": lambda n: U + "\n" * n + A,
    "escaped lines": lambda n: U + "\\<|user|>\n" * n + A,
    "tags in lines": lambda n: U + "x <|eot_id|>\n" * n + A,
    "escapes in a line": lambda n: "<|im_start|>user\n" + "\\<|im_end|>" * n + "<|im_end|>\n" + A,
    "one role's turns": lambda n: U * n + A,
    "exchanges": lambda n: (U + A) * n,
    "conversations": lambda n: ("<|endoftext|>\n" + U + A) * n,
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


def assert_sound(conversations):
    """What every reader promises about the conversations it yields."""
    for turns in conversations:
        roles = [role for role, _ in turns]
        assert set(roles) <= set(sft.ROLES) and roles[-1] == "assistant"
        assert next(role for role in roles if role != "system") == "user"
        assert all(one != other for one, other in pairwise(roles))
        assert all(content and content == content.strip() for _, content in turns)


TEXT = [*(f"<|{name}|>" for name in ("system", "user", "assistant", "endoftext", "im_end", "usr")), "\n", "\r\n", "q", " ",
        "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>", "\\<|user|>", "\\", "\0", "\ufeff", "é"]  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "gpt", "system", "x", "", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "type",
                    "text",
                    "messages",
                    "weight",
                    "system",
                    "prompt",
                    "completion",
                    "instruction",
                    "input",
                    "output",
                    "tools",
                    "tool_calls",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@fuzz
@given(st.binary(max_size=60) | st.lists(st.sampled_from(TEXT), max_size=25).map(lambda parts: "".join(parts).encode()))
def test_any_bytes(tmp_path_factory, data):
    file = write(str(tmp_path_factory.getbasetemp() / "any"), data)
    for input_format in ("chatml", "messages", "auto"):
        try:
            assert_sound(read(file, input_format=input_format)[0])
        except sft.InputError as error:
            assert re.fullmatch(re.escape(file) + r"(:\d+)?: [^;\n]+; [^\n]+", str(error))


@fuzz
@given(st.lists(st.fixed_dictionaries({"messages": st.lists(JSON, max_size=3)}) | JSON, max_size=3), st.booleans())
@example([{"messages": [{"role": {}, "content": "q"}]}], True)
def test_any_json(tmp_path_factory, data, lines):
    file = str(tmp_path_factory.getbasetemp() / "any.json")
    write(file, "\n".join(map(json.dumps, data)) if lines else json.dumps(data))
    try:
        assert_sound(read(file, input_format="messages")[0])
    except sft.InputError as error:
        assert re.fullmatch(re.escape(file) + r"(:\d+)?: [^;\n]+; [^\n]+", str(error))


def test_the_system_turn_that_all_conversations_share(tmp_path):
    """Whole files: with one other system turn, or one conversation without any, there is none."""
    pair, other = "<|user|>\nun ?\n<|assistant|>\ndeux.\n", tmp_path / "other.chatml"
    same = f"<|system|>\nTu es Dolores.\n{pair}"
    for text, system in (
        (same * 3, "Tu es Dolores."),
        (same, "Tu es Dolores."),
        (same + same.replace("Dolores", "Maeve"), None),
        (f"{pair}<|endoftext|>\n{same}", None),
        (f"{same}<|endoftext|>\n{pair}{same}", None),
        (f"{pair}<|endoftext|>\n{pair}", None),
    ):
        other.write_text(text)
        assert survey(str(other))[0]["system"] == system


@pytest.mark.parametrize("line", ["<user> how are you", "<|user> how are you", "<| user|> how", "<|utilisateur> a | b"])
def test_a_misspelled_tag_inside_a_turn_is_named(line):
    """It is text, so it would be trained; only what looks like a known tag is worth a warning."""
    write("d.chatml", f"<|user|>\nq\n<|assistant|>\na\n{line}\n")
    _, warned = survey("d.chatml")
    assert [(warning.line, "<|user|>" in warning.text) for warning in warned] == [(5, True)] * (
        "utilisateur" not in line
    )


def test_a_missing_separator_is_noticed():
    """Among short dialogues, a few with more exchanges may each be two that nothing separates; many are not named."""
    dialogue = "<|user|>\nq{0}\n<|assistant|>\na{0}\n"
    texts = [dialogue.format(i) for i in range(40)]
    pairs = [one + other for one, other in zip(texts[::2], texts[1::2], strict=True)]

    def named(*conversations: str) -> list[int]:
        write("d.chatml", "<|endoftext|>\n".join(conversations))
        return [line for _, line, _ in surveyed("d.chatml")]

    assert named(pairs[0], *texts[2:7]) == [1]
    assert named(pairs[0], *texts[2:9], pairs[10]) == [1, 10 + 7 * 5]
    assert named(*pairs[:2], *texts[4:8]) == named(*pairs[:6], *texts[12:]) == []


def test_a_system_turn_does_not_carry_over():
    dialogue = "<|user|>\nq{0}\n<|assistant|>\na{0}\n"
    write("d.chatml", "<|system|>\ns\n" + "<|endoftext|>\n".join(dialogue.format(i) for i in range(4)))
    _, warned = survey("d.chatml")
    assert [(warning.line, warning.kind) for warning in warned] == [(1, "system")]
    write("d.chatml", "".join("<|system|>\ns\n" + dialogue.format(i) for i in range(4)))
    assert survey("d.chatml")[1] == []
