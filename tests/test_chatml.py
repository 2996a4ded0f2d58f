"""Text -> turns: both ChatML dialects and rows of other formats, the place of each error, hostile data."""

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
        for finding in conversation.findings:
            assert finding.file in files
            if finding.level == "error":
                raise sft.InputError(str(finding))
            warned += [finding[2:]] if finding.level == "warning" else []
        conversations.append([(turn.role, turn.content) for turn in conversation.turns])
    return conversations, warned


def chatml(content):
    return read(write("d.chatml", content))[0]


def messages(content, file="d.jsonl"):
    return read(write(file, content), input_format="messages")[0]


def auto(content, file="d"):
    return read(write(file, content), input_format="auto")[0]


def survey(*files, input_format="auto", skip_bad=False) -> tuple[dict, list]:
    """(counts, findings) of these files."""
    args = arguments("--input-format", input_format, *["--skip-bad"] * skip_bad)
    return sft.read_data(sft.find_files(list(files)), args)[:2]


def listed(*files, **options) -> list[str]:
    """The lines of the error that the survey of these files raises."""
    return error_of(survey, *files, **options).split("\n")


def places(lines: list[str]) -> list[str]:
    return [line.split(": ")[0] for line in lines]


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
        "developer": ("<|developer|>\nS\n" + OK, [[("system", "S"), *QA]]),
        "BOM": ("\ufeff" + OK, [QA]),
        "BOM and zero width before a tag": (OK + "\ufeff<|endoftext|>\n\u200b\u2060<|user|>q\n<|assistant|>a", [QA, QA]),
        "BOM elsewhere is text": ("<|user|>\n\ufeffq\n<|assistant|>\na", [[("user", "\ufeffq"), QA[1]]]),
        "CRLF": ("<|user|>\r\nq\r\nr\r\n<|assistant|>\r\na\r\n<|endoftext|>\r\n", [[("user", "q\nr"), QA[1]]]),
        "old Mac": ("<|user|>\rq\rr\r<|assistant|>\ra\r<|endoftext|>\r", [[("user", "q\nr"), QA[1]]]),
        "no end of line": (OK.rstrip(), [QA]),
    }.values(),
)  # fmt: skip
def test_chatml(text, expected):
    assert chatml(text) == expected


def test_where_a_conversation_starts():
    one, two = "<|system|>\nS\n" + OK, OK.replace("q", "r")
    system, im = ("system", "S"), "<|im_start|>system\nS<|im_end|>\n" + OK
    assert chatml(OK + two) == [[*QA, ("user", "r"), ("assistant", "a")]]
    assert chatml(OK + one + one) == [QA, [system, *QA], [system, *QA]]
    assert chatml(OK + "<|endoftext|>\n\n" + OK + "<|endoftext|>\n<|endoftext|>\n") == [QA, QA]
    assert chatml(im + im) == [[system, *QA]] * 2


def test_line_numbers():
    write("d.chatml", "\n<|user|>\nq\n<|assistant|>\na\n<|endoftext|>\n\n<|system|>\nS\n\n" + OK)
    one, two = sft.read_conversations(["d.chatml"], "chatml")
    assert (one.file, one.line, [turn.line for turn in one.turns]) == ("d.chatml", 2, [2, 4])
    assert (two.file, two.line, [turn.line for turn in two.turns]) == ("d.chatml", 8, [8, 11, 13])
    write("d.jsonl", "\n" + row(*QA) + "\n\n" + row(*QA))
    assert [(c.line, c.turns[0].line) for c in sft.read_conversations(["d.jsonl"], "auto")] == [(2, 2), (4, 4)]


ROLE_TAGS, IM = (
    "<|user|>\nq\n{}\n<|assistant|>\na",
    "<|im_start|>user\nq\n{}<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
)


@pytest.mark.parametrize(
    "text, written, meant",
    [
        (ROLE_TAGS, r"\<|user|>", "<|user|>"),
        (ROLE_TAGS, r"\\<|user|>", r"\<|user|>"),
        (ROLE_TAGS, r"\<|endoftext|> x", "<|endoftext|> x"),
        (ROLE_TAGS, r"\<|nonsense|>", "<|nonsense|>"),
        (ROLE_TAGS, r"x \<|user|>", r"x \<|user|>"),
        (ROLE_TAGS, r"\n <|user", r"\n <|user"),
        (IM, r"\<|im_end|>", "<|im_end|>"),
        (IM, r"x\<|im_end|>y\\<|im_end|>", r"x<|im_end|>y\<|im_end|>"),
        (IM, r"\<|im_start|>user", "<|im_start|>user"),
        (IM, r"\\<|im_start|>user", r"\<|im_start|>user"),
        (IM, r"x \<|im_start|>", r"x \<|im_start|>"),
        (IM, r"\<|user|>", r"\<|user|>"),
        (IM, r"\\<|im_end|>\<|im_end|>", r"\<|im_end|><|im_end|>"),
    ],
)
def test_escapes(text, written, meant):
    assert chatml(text.format(written)) == [[("user", "q\n" + meant), QA[1]]]


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


def trained_answers(content) -> list[tuple[str, bool]]:
    """[(content, trained)] of all answers."""
    found = sft.read_conversations([write("d", content)], "auto")
    return [(turn.content, turn.trained) for c in found for turn in c.turns if turn.role == "assistant"]


@pytest.mark.parametrize(
    "off, on",
    [({"weight": 0}, {"weight": 1}), ({"weight": 0.0}, {}), ({"train": False}, {"train": True}), ({"loss": False}, {"loss": True}),
     ({"training": False}, {"weight": None}), ({"trainable": False}, {"train": True, "weight": 1}), ({"train": False, "weight": 1}, {})],
)  # fmt: skip
def test_flags_of_answers_that_are_only_context(off, on):
    """What OpenAI, Axolotl, ms-swift and others call them."""
    turns = [OPENAI[1], {**OPENAI[2], **off}, OPENAI[1], {**OPENAI[2], "content": "b", **on}]
    assert trained_answers(json.dumps({"messages": turns})) == [("a", False), ("b", True)]


def test_answers_that_are_only_context():
    other = U + "<|assistant:context|> a\n" + U + "<|assistant|>\nb\n"
    im = U + "<|im_start|>assistant:context\na<|im_end|>\n" + U + "<|im_start|>assistant\nb<|im_end|>\n"
    assert trained_answers(other) == trained_answers(im) == [("a", False), ("b", True)]
    (other,) = sft.read_conversations(["d"], "chatml")
    plain = other.turns[1]._replace(trained=True)
    assert sft.digest(other.turns) != sft.digest([other.turns[0], plain, *other.turns[2:]])


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
        write(name, OK.replace("q", q))  # fmt: skip

    def asked(*patterns) -> list[str]:
        """What the user says in each conversation of the files that match."""
        return [conversation[0][1] for conversation in read(*sft.find_files(list(patterns)))[0]]

    assert asked("b.chatml", "a.chatml") == ["1", "2"]
    assert asked("[ab].chatml", "b.chatml") == ["2", "1"]
    assert asked("**/*.chatml") == ["2", "1", "3", "5", "4"]
    assert asked("x [1].chatml") == ["4"], "the name of an existing file is not a glob"


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
    for name in ("nô.chatml", "*.chatml", "."):
        assert_says(error_of(sft.find_files, [name]), name)
    for name, place in (("empty", "empty"), ("e.jsonl", "e.jsonl"), ("e.csv", "e.csv:1"), ("e.parquet", "e.parquet")):
        assert_says(error_of(auto, "", name), place)
    assert_says(error_of(sft.find_files, ["pipe"]), "pipe", "once")
    assert_says(error_of(sft.find_files, ["folder"]), r"'folder/caf\udce9.chatml'", "UTF-8")


@contextlib.contextmanager
def as_nobody():
    """Become another user where these tests run as root, who may read everything."""
    import huggingface_hub.file_download  # noqa: F401 - nobody may not read all of Python

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
OPENAI = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": " q\n"},
    {"role": "assistant", "content": "a"},
]
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SQA = [("system", "S"), *QA]
PROMPT = {"prompt": "q", "completion": " a"}
ALPACA = {"instruction": "q", "input": "", "output": "a"}


def row(*turns, **fields):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **fields})


def answer(**fields) -> str:
    """A row whose answer has these keys too."""
    return json.dumps({"messages": [OPENAI[1], {**OPENAI[2], **fields}]})


CHATML_ERRORS = [  # (text, place, a fact in the message)
    (OK.encode() + b"<|user|>\ncaf\xe9\n", "d.chatml:6", "0xe9"),
    (U.encode() + b"\xed\xa0\x80", "d.chatml:3", "0xed"),
    (OK + "<|user|>\nr\0\0\n" + A, "d.chatml:6", "NUL"),
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
    (U + "<|assistant|>\n\u200b\u2060\ufe0f\n", "d.chatml:3", "empty assistant"),
    ("<|user|>\n\n" + A, "d.chatml:1", "empty user"),
    ("\ufeff", "d.chatml", "README"),
    ("\n \n<|endoftext|>\n\n", "d.chatml", "README"),
    ("<|im_start|>user\nq\n<|im_start|>assistant\na<|im_end|>", "d.chatml:1", "<|im_end|>"),
    (OK + "<|im_start|>user\nq\n", "d.chatml:5", "<|im_end|>"),
    ("<|im_start|>user\nq<|im_end|> r\n", "d.chatml:2", "<|im_end|>"),
]
MESSAGES_ERRORS = [
    (row(*QA) + "\n{'messages': []}", "d.jsonl:2", "property name enclosed in double quotes"),
    ("\n[\n" + row(*QA) + "\n" + row(*QA) + "]", "d.jsonl:4", "',' delimiter"),
    (
        json.dumps(json.loads(row(*QA)), indent=1) + "\n{\n'a': 1}",
        "d.jsonl:14",
        "property name enclosed in double quotes",
    ),
    (OK, "d.jsonl:1", "JSON"),
    ('"text"', "d.jsonl:1", "messages"),
    ("{}", "d.jsonl:1", "messages"),
    ('{"messages": {"role": 1}}', "d.jsonl:1", "messages"),
    ('{"messages": ["q"]}', "d.jsonl:1", "role"),
    (json.dumps({"version": 1, "data": [PROMPT, PROMPT]}, indent=1), "d.jsonl:1", "'data'"),
    (row(("usr", "q")), "d.jsonl:1", "'usr'"),
    (row(QA[0], ("tool", "{}"), QA[1]), "d.jsonl:1", "tool"),
    (answer(content=None, tool_calls=[{}]), "d.jsonl:1", "tool"),
    (answer(weight=0.5), "d.jsonl:1", "weight 0.5"),
    (answer(loss="no"), "d.jsonl:1", "loss 'no'"),
    (answer(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]), "d.jsonl:1", "'train_detail'"),
    (answer(audio={"id": "x"}), "d.jsonl:1", "'audio'"),
    (row(*QA, label=False), "d.jsonl:1", "'label'"),
    (row(*QA, images=["a.jpg"]), "d.jsonl:1", "'images'"),
    (row(QA[0], chosen=OPENAI[2], rejected=OPENAI[2]), "d.jsonl:1", "'chosen'"),
    (json.dumps({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": ""}), "d.jsonl:1", "'chosen'"),
    (json.dumps({**ALPACA, "Image": "a.jpg"}), "d.jsonl:1", "'image'"),
    (json.dumps({**ALPACA, "history": [["q", "a"]]}), "d.jsonl:1", "'history'"),
    (json.dumps({"messages": [OPENAI[1], {**OPENAI[2], "weight": 0}, OPENAI[2]]}), "d.jsonl:1", "only context"),
    (json.dumps({"conversations": SHAREGPT[1:], "system": ["S"]}), "d.jsonl:1", "system"),
    (json.dumps({**PROMPT, "prompt": None}), "d.jsonl:1", "user"),
    (json.dumps({**ALPACA, "input": 1}), "d.jsonl:1", "user"),
    (row((["user"], "q")), "d.jsonl:1", "['user']"),
    (row((None, "q")), "d.jsonl:1", "None"),
    (row(("user", None)), "d.jsonl:1", "user"),
    (row(("user", 1)), "d.jsonl:1", "user"),
    (row(("user", [{"type": "image"}])), "d.jsonl:1", "user"),
    (row(("user", [{"type": "text", "text": 1}])), "d.jsonl:1", "user"),
    (row(("user", [{"type": "text", "text": {"value": "q", "annotations": []}}])), "d.jsonl:1", "'text'"),
    (row(("user", [{"type": "text", "value": "q"}])), "d.jsonl:1", "'text'"),
    (json.dumps({"messages": [{"role": "user", "text": "q"}, OPENAI[2]]}), "d.jsonl:1", "'content'"),
    (row(("user", "a\ud800b")), "d.jsonl:1", "surrogate"),
    (row(("user", "a\0b")), "d.jsonl:1", "NUL"),
    (row(*QA) + "\n" + row(("user", " "), QA[1]), "d.jsonl:2", "empty user"),
    (row(QA[0]), "d.jsonl:1", "assistant"),
    (row(QA[1]), "d.jsonl:1", "user"),
    ("\n\n", "d.jsonl", "README"),
    ("[]", "d.jsonl", "README"),
    (row(*QA).encode("latin-1") + b"\n\xe9", "d.jsonl:2", "0xe9"),
]
AUTO_ERRORS = [  # (name, content, place, a fact)
    ("d.csv", "question,answer\nq,a\n", "d.csv:1", "question,answer"),
    ("d.csv", "prompt,completion\nq,a\nq,a,b\n", "d.csv:3", "3 fields"),
    ("d.csv", 'prompt,completion\nq,a\n"q,a\nq,a\n', "d.csv:3", "CSV"),
    ("d.csv", "sep=;\nprompt;completion\nq;\n", "d.csv:3", "assistant"),
    ("d.csv", "prompt,completion,Label\nq,a,true\n", "d.csv:2", "'label'"),
    ("d.csv", "prompt,completion,Prompt\nq,a,r\n", "d.csv:1", "'prompt'"),
    ("d.csv", "prompt,completion\n", "d.csv", "README"),
    ("d.jsonl", '{"question": "q", "answer": "a"}', "d.jsonl:1", "question, answer"),
    ("d.txt", "Bonjour\n" + OK, "d.txt:1", "<|user|>"),
    ("d.parquet", b"PAR1 ...", "d.parquet", "Parquet"),
    ("d.jsonl.gz", b"\x1f\x8b\x08\x00", "d.jsonl.gz", "gzip"),
    ("d.jsonl", b"\x28\xb5\x2f\xfd", "d.jsonl", "zstd"),
    ("d.docx", b"PK\x03\x04", "d.docx", "Office"),
    ("d.db", b"SQLite format 3\0", "d.db", "SQLite"),
    ("d.arrow", b"\xff\xff\xff\xff\x10\0\0\0", "d.arrow", "Arrow"),
    ("d.rtf", b"{\\rtf1\\ansi", "d.rtf", "RTF"),
    ("d.jsonl", b"\n<!DOCTYPE html><html>", "d.jsonl", "HTML"),
    ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "d.jsonl", "LFS"),
    ("d.chatml", OK.encode("utf-16"), "d.chatml", "UTF-16"),
    ("d.chatml", OK.encode("utf-16-le"), "d.chatml:1", "NUL"),
    ("mes données.txt", "<|user|>\nÉté à la mer ?\n".encode("cp1252"), "mes données.txt:2", "0xc9"),
]


@pytest.mark.parametrize("text, place, fact", CHATML_ERRORS)
def test_chatml_errors(text, place, fact):
    assert_says(error_of(chatml, text), place, fact)


@pytest.mark.parametrize("text, place, fact", MESSAGES_ERRORS)
def test_messages_errors(text, place, fact):
    assert_says(error_of(messages, text), place, fact)


@pytest.mark.parametrize("name, content, place, fact", AUTO_ERRORS)
def test_errors_of_detected_formats(name, content, place, fact):
    assert_says(error_of(auto, content, name), place, fact)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"messages": ' + "[" * 100_000, '{"messages": ' + "1" * 5000 + "}"])
def test_json_that_python_refuses(text):
    """Nested too deeply, or a number too long: Python raises no JSONDecodeError, the script prints one line."""
    assert_says(error_of(messages, text), "d.jsonl:1")


def test_all_errors_of_the_data_are_listed():
    good, bad = "<|endoftext|>\n" + OK, "<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|usr|>\n"
    write("d", good + bad + good + "<|endoftext|> r\n" + U + good + "<|endoftext|>\n" + A)
    write("e", OK + "\n" + U + "\xff\n" + "<|im_start|>user\nq\n<|im_start|>assistant\na<|im_end|>\n")
    lines = listed("d", "e")
    assert places(lines)[:5] == ["d:9", "d:11", "d:17", "d:26", "e:9"] and len(lines) == 6
    assert "5 errors" in lines[5] and "--skip-bad" in lines[5]
    # An unknown role does not hide the next one.
    write("d", "<|im_start|>usr q<|im_end|>\n<|usr|>\n<|im_start|>usr\n<|usr|>\n")
    assert places(listed("d"))[:4] == ["d:1", "d:2", "d:3", "d:3"]
    # Nor a bad row.
    write("d.jsonl", "\n".join([row(*QA), "{", row(("usr", "q"), ("assistant", 1)), row(*QA)]))
    assert places(listed("d.jsonl"))[:2] == ["d.jsonl:2", "d.jsonl:3"]


def test_many_errors():
    """Equal ones are one line; of others the first twenty are shown; --skip-bad only where it would leave something."""
    bad = "<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|usr|>\n"
    write("d", "<|endoftext|>\n" + OK + "".join(bad.replace("usr", f"r{i}") for i in range(30)))
    lines = listed("d")
    assert len(lines) == 21 and all(re.match(r"d:\d+: ", line) for line in lines[:20]) and "11 more" in lines[20]
    assert lines[0].endswith(" (30 times)") and "60 errors" in lines[20] and "--skip-bad" in lines[20]
    write("d.jsonl", '{"question": "q", "answer": "a"}\n' * 30)
    (line,) = listed("d.jsonl")
    assert line.startswith("d.jsonl:1: ") and "30 times" in line and "--skip-bad" not in line


def test_skip_bad():
    write("d", OK + "<|endoftext|>\n<|user|>\nq\n<|assitant|>\na\n<|endoftext|>\n" + OK.replace("q", "r"))
    counts, (finding,) = survey("d", skip_bad=True)
    assert (counts["conversations"], counts["skipped"]) == (2, 1)
    assert finding[:4] == ("warning", "d", 8, "skipped") and "<|assistant|>" in finding.text
    write("d.jsonl", "\n".join([row(*QA), "{", row(("usr", "q")), row(*QA)]))
    counts, _ = survey("d.jsonl", skip_bad=True)
    assert (counts["conversations"], counts["skipped"]) == (2, 2)
    write("d", A)
    assert_says(listed("d", skip_bad=True)[0], "d", "--skip-bad")


def test_what_cannot_be_read_is_not_skipped():
    """How many conversations would be lost is not known."""
    write("d", OK.encode() + b"\xe9")
    assert_says(listed("d", skip_bad=True)[0], "d:5", "0xe9")
    write("d", OK + "<|user|>\n" + A), write("e", b"<\xe9")
    assert places(listed("e", "d")) == ["e:1", "d:5"]


def test_no_text_of_a_file_controls_the_terminal():
    """An escape sequence or a direction override in a name is printed as visible text; a long one is cut."""
    tag, shown = "<|\x1b[2Ja\u202e|>", "<|\\x1b[2Ja\\u202e|>"
    error = error_of(chatml, U + tag)
    assert_says(error, "d.chatml:3", shown, f"\\{shown}")
    write("c", f"<|user|>q {tag}\n" + A)
    write("m", row(("user", tag), QA[1]))
    for warnings in (read("c")[1], read("m", input_format="messages")[1]):
        ((line, kind, text),) = warnings
        assert (line, kind) == (1, "tag") and shown in text and tag not in text
    for text in ("<|im_start|>user " + "x" * 10_000_000, "<|im_start|>" + "é" * 1000 + "\n"):
        assert len(error_of(chatml, text)) < 400
    joined = "می\u200cخواهم 👩\u200d👧 a\u3000b\u00a0!"
    assert sft.escape_controls(joined) == joined
    assert sft.escape_controls("a\u200bb\u2800\u00ad") == r"a\u200bb\u2800\xad"


# ---- warnings ----


def warned(text: str) -> list[tuple]:
    """[(line, kind, text)] of the warnings of a ChatML file."""
    return read(write("d", text))[1]


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
             "L'user |> x", "system | user", "**user**", "a < user | b", "<| utilisateur>"]  # fmt: skip
    assert warned("<|user|>\n" + "\n".join(lines) + "\n" + A) == []
    assert warned(Path(sft.__file__).with_name("train.chatml").read_text(encoding="utf-8")) == []


def test_what_is_ignored():
    found, warnings = read(write("d", "<|system|>\n\u200b\n" + OK + U))
    assert found == [QA]
    assert [warning[:2] for warning in warnings] == [(1, "empty system"), (7, "no answer")]


@pytest.mark.parametrize("token", ["<|end|>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "</s>", "<end_of_turn>"])
def test_end_tokens_of_other_formats(token):
    """They would be trained as text: a warning in both formats, and an error alone on a line if it looks like a tag."""
    ((line, kind, text),) = warned(U + f"<|assistant|>\na{token}\n")
    assert (line, kind) == (4 if "|" in token else 3, "tag") and token in text and "delete" in text
    ((line, kind, text),) = read(write("m", row(QA[0], ("assistant", "a" + token))), input_format="messages")[1]
    assert (line, kind) == (1, "tag") and token in text
    if "|" in token:
        assert_says(error_of(chatml, U + token + "\n" + A), "d.chatml:3", "delete", "\\" + token)
    assert warned(U + "<|assistant|>\nIn HTML <s>a</s> is struck out.") == []


def test_a_separator_at_the_end_of_a_line():
    ((line, kind, text),) = warned(U + "<|assistant|>\na<|endoftext|>\n" + OK)
    assert (line, kind) == (4, "tag") and "start a line" in text
    ((line, kind, text),) = read(write("m", row(QA[0], ("assistant", "a<|endoftext|>"))), input_format="messages")[1]
    assert (line, kind) == (1, "tag") and "start a line" not in text


def surveyed(*files: str) -> list[tuple]:
    """[(file, line, kind)] of the warnings that the survey adds, apart from copies."""
    return [finding[1:4] for finding in survey(*files)[1] if finding.kind != "duplicate"]


def test_dialogues_that_nothing_separates():
    write("d", OK * 12)
    (finding,) = survey("d")[1]
    assert finding.text.startswith("12 exchanges are one conversation") and "<|endoftext|>" in finding.text
    assert surveyed("d") == [("d", 1, "several exchanges")]
    assert surveyed(write("e", "\n" + OK * 2)) == [("e", 2, "several exchanges")]
    assert surveyed("d", "e") == [], "a file for each dialogue is a usual layout"
    assert surveyed(write("f", OK + "<|endoftext|>\n" + OK * 30)) == [("f", 6, "several exchanges")]
    assert surveyed(write("g", OK)) == surveyed(write("h", "<|endoftext|>\n".join([OK] * 40))) == []


def test_a_system_turn_does_not_carry_over():
    dialogue = "<|user|>\nq{0}\n<|assistant|>\na{0}\n"
    write("d", "<|system|>\ns\n" + "<|endoftext|>\n".join(dialogue.format(i) for i in range(4)))
    assert surveyed("d") == [("d", 1, "system")]
    assert surveyed(write("e", "".join("<|system|>\ns\n" + dialogue.format(i) for i in range(4)))) == []


def test_the_system_turn_that_all_conversations_share():
    """Whole files: with one other system turn, or one conversation without any, there is none."""
    pair = "<|user|>\nun ?\n<|assistant|>\ndeux.\n"
    same = f"<|system|>\nTu es Dolores.\n{pair}"
    for text, system in (
        (same * 3, "Tu es Dolores."),
        (same, "Tu es Dolores."),
        (same + same.replace("Dolores", "Maeve"), None),
        (f"{pair}<|endoftext|>\n{same}", None),
        (f"{same}<|endoftext|>\n{pair}{same}", None),
        (f"{pair}<|endoftext|>\n{pair}", None),
    ):
        assert survey(write("d", text))[0]["system"] == system


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
}  # fmt: skip


@pytest.mark.parametrize("record, expected", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_rows(record, expected):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), "d")
    whole, indented = json.dumps([record, record], indent=1), json.dumps(record, indent=1)
    for content in (json.dumps(record), whole, indented, f"{indented}\n\ufeff{indented}\n", Path("d").read_bytes()):
        for name in ("d", "d.txt", "d.json", "d.JSONL", "d.chatml"):
            found, warnings = read(write(name, content), input_format="auto")
            assert found[0] == expected and set(map(str, found)) == {str(expected)} and not warnings


def test_messages():
    both = [{"messages": OPENAI}, {"conversations": SHAREGPT}]
    lines = "\n".join(map(json.dumps, both))
    assert messages(lines) == messages("\ufeff\r\n" + lines.replace("\n", "\r\n\r\n") + "\r\n") == [SQA, SQA]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([both[0]] * 2500), "d.parquet")
    assert read("d.parquet", input_format="messages")[0] == [SQA] * 2500
    # Role tags in contents are text: only the fields give a role.
    assert messages(row(("user", "q\n<|assistant|>\nx"), *QA, QA[0])) == [[("user", "q\n<|assistant|>\nx\n\nq"), QA[1]]]
    assert messages(row(("user", "\ud83d\ude42"), QA[1])) == [[("user", "🙂"), QA[1]]], "a pair of surrogates"


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
    assert_says(error_of(messages, OK, "d.parquet"), "d.parquet", "Parquet")
    rows = [json.loads(row(("user", f"q{i}"), ("assistant", "a" * (i + 1)))) for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "d.parquet")
    whole = Path("d.parquet").read_bytes()
    for damaged in (whole[:-100], whole[:500] + b"\xff" * 1500 + whole[2000:]):  # the footer, the pages
        assert_says(error_of(messages, damaged, "d.parquet"), "d.parquet")
    buffers = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"q\xed\xa0")
    strings = pyarrow.StringArray.from_buffers(2, *buffers)  # not UTF-8
    turn = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "assistant"]), strings], ["role", "content"])
    table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays(pyarrow.array([0, 2], pyarrow.int32()), turn)})
    pyarrow.parquet.write_table(table, "d.parquet")
    assert_says(error_of(read, "d.parquet", input_format="messages"), "d.parquet", "UTF-8")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("excel", [False, True])
def test_csv(delimiter, excel):
    """As Excel writes it: a line `sep=`, CRLF, empty columns and rows."""
    lines = ["Prompt|Completion|note|", "q|a||", '"q, ""r"";\n\ts"|" a\n"|x|', "", "q|a|y|", "|||", "|||"]
    text = "\ufeff" + "\r\n".join(line.replace("|", delimiter) for line in [*["sep=|"] * excel, *lines])
    assert auto(text, "d.csv") == [QA, [("user", 'q, "r";\n\ts'), QA[1]], QA]
    assert [c.line - excel for c in sft.read_conversations(["d.csv"], "auto")] == [2, 3, 7]
    assert survey("d.csv")[0]["not_read"]["row"] == {"note": 2}


def test_csv_with_long_texts_and_all_columns():
    assert auto("instruction,input,output,system\nq,r,a,S\n", "d.csv") == [[("system", "S"), ("user", "q\n\nr"), QA[1]]]
    assert auto("prompt,completion\nq," + "a" * 300_000, "d.csv") == [[QA[0], ("assistant", "a" * 300_000)]]


def test_quotes_in_a_tsv_are_text():
    """No quote holds lines together where each line is a row; a field that is quoted as a whole loses its quotes."""
    text = 'prompt\tcompletion\nq\t"a\nq\ta\nq\tb"\nq\t"a ""b"" c"\nq\t"a" b\n'
    answers = ['"a', "a", 'b"', 'a "b" c', '"a" b']
    assert auto(text, "d.tsv") == [[QA[0], ("assistant", answer)] for answer in answers]


def test_the_flag_overrides():
    assert messages(row(*QA), "d.chatml") == [QA]
    assert_says(error_of(messages, OK, "d.json"), "d.json:1", "JSON")
    for name, content, kind in (("d", row(*QA), "JSON"), ("d.csv", "q", "CSV"), ("d", b"PAR1", "Parquet")):
        assert_says(error_of(read, write(name, content)), name, kind, "--input-format chatml")


# ---- hostile data ----


@pytest.mark.parametrize(
    "hostile", ["a\u202e\u2066abc\u2069", "\x1b[31m", "a\x0b\x0cb", "\ufffe", "\U0010ffff", "a\x85b\u2028c"]
)
def test_hostile_contents_are_unchanged(hostile):
    assert chatml(f"<|user|>\n{hostile}\n<|assistant|>\n{hostile}") == [[("user", hostile), ("assistant", hostile)]]
    assert messages(row(("user", hostile), ("assistant", hostile))) == [[("user", hostile), ("assistant", hostile)]]


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
    ((user, _),) = chatml("<|user|>\nq q q q q\n" * 500_000 + A)  # a copy at each join would move terabytes
    assert user[1] == "\n\n".join(["q q q q q"] * 500_000)


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


def assert_sound(conversations):
    """What every reader promises about the conversations it yields."""
    for turns in conversations:
        roles = [role for role, _ in turns]
        assert set(roles) <= set(sft.ROLES) and roles[-1] == "assistant"
        assert next(role for role in roles if role != "system") == "user"
        assert all(one != other for one, other in pairwise(roles))
        assert all(content and content == content.strip() for _, content in turns)


TEXT = [*(f"<|{name}|>" for name in ("system", "user", "assistant", "endoftext", "im_end", "usr")), "\n", "\r\n", "\r", "q", " ",
        "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>", "\\<|user|>", "\\", "\0", "\ufeff", "\u200b", "é"]  # fmt: skip
KEYS = ("role", "content", "from", "value", "type", "text", "messages", "weight", "loss", "system", "prompt", "completion",
        "instruction", "input", "output", "tools", "tool_calls", "label", "name")  # fmt: skip
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "gpt", "system", "x", "", "\ud800", "\0"])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.fixed_dictionaries({"messages": st.lists(JSON, max_size=3)}) | JSON, max_size=3)


@fuzz
@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from(TEXT), max_size=25).map(lambda parts: "".join(parts).encode())
    | st.tuples(ROWS, st.booleans()).map(
        lambda d: ("\n".join(map(json.dumps, d[0])) if d[1] else json.dumps(d[0])).encode()
    )
)
@example(b'[{"messages": [{"role": {}, "content": "q"}]}]')
def test_any_bytes(tmp_path_factory, data):
    file = write(str(tmp_path_factory.getbasetemp() / "any"), data)
    for input_format in ("chatml", "messages", "auto"):
        try:
            assert_sound(read(file, input_format=input_format)[0])
        except sft.InputError as error:
            assert re.fullmatch(re.escape(file) + r"(:\d+)?: [^;\n]+; [^\n]+", str(error))
