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
from runs import assert_says, error_of

import train_sft_dolores as sft

OK = "<|user|>\nq\n<|assistant|>\na\n"
QA = [("user", "q"), ("assistant", "a")]
fuzz = settings(deadline=None, database=None, max_examples=150)


def write(file: str, content) -> str:
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(*files: str, input_format="chatml"):
    """[[(role, content)]] of each conversation, and the warnings as [(line, kind, text)]."""
    warned = []

    def warn(file, *warning):
        assert file in files
        warned.append(warning)

    found = sft.read_conversations(list(files), input_format, warn)
    return [[(turn.role, turn.content) for turn in conversation.turns] for conversation in found], warned


def chatml(content):
    return read(write("d.chatml", content))[0]


def messages(content, file="d.jsonl"):
    return read(write(file, content), input_format="messages")[0]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Messages name files as the user gave them: short names, when the test works in their folder."""
    monkeypatch.chdir(tmp_path)


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
         "<|eot_id|>", "<|oops|>", "<|", "|>", "{{ x }}", "é", "🙂", "\0", "\u202e", "\x85", "\u2028", "a"]  # fmt: skip
contents = st.lists(st.sampled_from(ATOMS), min_size=1, max_size=12).map("".join).map(str.strip).filter(bool)
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
    (OK.encode("utf-16"), "d.chatml:1", "0xff"),
    (U.encode() + b"\xed\xa0\x80", "d.chatml:3", "0xed"),
    (U + "<|assitant|>\na\n", "d.chatml:3", "<|assistant|>"),
    (U + "<|Assistant|>\na\n", "d.chatml:3", "<|assistant|>"),
    (U + "<|eot_id|>\n" + A, "d.chatml:3", "\\<|eot_id|>"),
    ("<|im_start|>usr\nq<|im_end|>\n", "d.chatml:1", "user"),
    ("<|im_start|>tool\nq<|im_end|>\n", "d.chatml:1", "system, user, assistant"),
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
             " <|user", "<user|", "|USER>", "<||user||>", "<｜user｜>"],
)  # fmt: skip
def test_what_looks_like_a_tag(line):
    """A line that begins with a misspelt tag is text, but never without a warning."""
    found, ((number, kind, warning),) = read(write("d", f"<|user|>\nq\n{line}\nr\n" + A))
    assert found == [[("user", f"q\n{line}\nr"), QA[1]]]
    assert (number, kind) == (3, "tag") and "<|user|>" in warning
    im = f"<|im_start|>user\nq\n{line}<|im_end|>\n" + A
    assert [warning[:2] for warning in read(write("d", im))[1]] == [(3, "tag")]


def test_what_does_not_look_like_a_tag():
    lines = ["user", "User: q", "<user>", "| user | nom |", "<|username|", "> user", "users|>", "a <|user>", "<|", "|>", "\\<|user|>",
             "L'user |> x", "system | user", "**user**", "a < user | b"]  # fmt: skip
    assert read(write("d", "<|user|>\n" + "\n".join(lines) + "\n" + A))[1] == []
    corpus = Path(sft.__file__).with_name("train.chatml").read_text(encoding="utf-8")
    assert read(write("d", corpus))[1] == []


def test_warnings():
    found, warnings = read(write("d", "<|system|>\n\n" + OK + U))
    assert found == [QA]
    assert [warning[:2] for warning in warnings] == [(1, "empty system"), (7, "no answer")]


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


# ---- hostile data ----


def test_hostile_contents_are_unchanged():
    for hostile in (
        "\0",
        "x\0\0y",
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
    "a long line of blanks": lambda n: "a" + " " * n + "b",
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
            sft.survey(sft.find_files([file]), "chatml")
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
            st.sampled_from(["role", "content", "from", "value", "type", "text", "messages"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@fuzz
@given(st.binary(max_size=60) | st.lists(st.sampled_from(TEXT), max_size=25).map(lambda parts: "".join(parts).encode()))
def test_any_bytes(tmp_path_factory, data):
    file = write(str(tmp_path_factory.getbasetemp() / "any"), data)
    for input_format in ("chatml", "messages"):
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
        assert sft.survey_conversations([str(other)], "chatml")["system"] == system
