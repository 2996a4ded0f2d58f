#!/usr/bin/env python3
"""Coverage-guided fuzzing of the data readers and the encoder, on SmolLM2's vocabulary. Needs atheris (PyPI).

    python benchmarks/fuzz.py chatml -runs=1000000          # or messages, or parquet; further options are libFuzzer's

Whatever a file holds: the readers yield sound conversations or raise InputError with one printable line; no content
becomes a control token; exactly the answers and their end tokens are trained; the ids decode to the text again, where
the vocabulary has a token for each of its bytes. An input that breaks this, or takes ten seconds, is kept as
crash-* or timeout-* in the working directory: give its name as an option to see it again.
"""

import io
import json
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

try:
    import atheris
except ImportError:
    sys.exit("atheris is missing: pip install atheris (it is in no requirements file: only this script needs it)")

with atheris.instrument_imports(include=["train_sft_dolores", "json"]):
    import train_sft_dolores as sft

import parts  # noqa: E402

KIND = "".join(sys.argv[1:2])
READER = "chatml" if KIND == "chatml" else "messages"
FILE = str(Path(tempfile.mkdtemp(prefix="fuzz")) / ("d.parquet" if KIND == "parquet" else "d"))
NAMES = ["system", "user", "assistant", "assistant:context", "endoftext", "im_start", "im_end", "usr", "User", "eot_id", "é", "\x1b[31m", "a;b"]  # fmt: skip
ATOMS = [*(f"<|{name}|>" for name in NAMES), "<|im_start|>user\n", "<|im_start|> assistant \n", "<|im_end|>\n", "\n", "\n\n",
         "\r\n", "\r", "\\", "\\<|user|>", "\\\\<|im_end|>", "\u200b<|user|>", "<|user", "|user|>", "<| user |>", "<user|>", " ", "\t", "\0", "\ufeff",
         "\u202e", "\x85", "\u2028", "\x1b[2J", "Ã©", "é", "e\u0301", "🙂", "\U0010ffff", "q ?", "a.", "{{ x }}", "<s>"]  # fmt: skip
KEYS = ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "role", "content",
        "from", "value", "type", "text", "weight", "loss", "train", "label", "images", "tool_calls", "name", "data"]  # fmt: skip
VALUES = ["user", "assistant", "system", "human", "gpt", "tool", "", "q", "text", "\ud800", *ATOMS]


def any_json(data, depth=0):
    """A random JSON value, sometimes nested."""
    kind = data.ConsumeIntInRange(0, 5 if depth < 5 else 3)
    if kind < 2:
        return data.PickValueInList(VALUES)
    if kind == 2:
        return data.PickValueInList([None, True, 0, -1.5, 10**30, float("nan")])
    if kind == 3:
        return data.ConsumeUnicode(data.ConsumeIntInRange(0, 20))
    count = data.ConsumeIntInRange(0, 4)
    if kind == 4:
        return [any_json(data, depth + 1) for _ in range(count)]
    return {data.PickValueInList(KEYS): any_json(data, depth + 1) for _ in range(count)}


def text(data) -> str:
    """A random text of ordinary, hostile and control pieces."""
    return "".join(data.PickValueInList(ATOMS) for _ in range(data.ConsumeIntInRange(0, 40)))


def dialogue(data) -> list[tuple[str, str]]:
    """(role, content): nearly always sound, so that what comes after the reader is reached too."""
    usually = lambda this, other: other() if data.ConsumeIntInRange(0, 19) == 19 else this  # noqa: E731
    turns = [("system", text(data))] if data.ConsumeBool() else []
    for i in range(2 * data.ConsumeIntInRange(1, 3)):
        role = usually(("user", "assistant")[i % 2], lambda: data.PickValueInList(NAMES))
        turns.append(
            (role, usually("q" + text(data) + data.ConsumeUnicodeNoSurrogates(data.ConsumeIntInRange(0, 9)), str))
        )
    return turns


def file_content(raw: bytes) -> bytes:
    """The bytes themselves, or what they make when they choose among the pieces above."""
    data, shape = atheris.FuzzedDataProvider(raw[1:]), raw[0] % 4 if raw else 0
    if KIND == "parquet":
        return parquet(data)
    if shape == 0:
        return raw[1:]
    if READER == "messages":
        rows = [any_json(data)] if shape == 1 else []
        for _ in range(data.ConsumeIntInRange(0, 2)):
            rows.append({"messages": [{"role": role, "content": content} for role, content in dialogue(data)]})
        return ("\n".join(map(json.dumps, rows)) if shape == 3 else json.dumps(rows)).encode()
    written = text(data) if shape == 1 else "<|endoftext|>\n"
    for role, content in dialogue(data) if shape > 1 else ():
        content = re.sub(r"(^\\*<\||\\*<\|im_end\|>)", r"\\\1", content, flags=re.MULTILINE)
        written += f"<|{role}|>\n{content}\n" if data.ConsumeBool() else f"<|im_start|>{role}\n{content}\n<|im_end|>\n"
    return written.encode("utf-8", "surrogatepass" if shape == 3 and data.ConsumeIntInRange(0, 9) == 9 else "replace")


def parquet(data) -> bytes:
    """A real file of conversations, some of its bytes changed."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * (i + 1)}]}
        for i in range(9)
    ]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    content = bytearray(sink.getvalue())
    for _ in range(data.ConsumeIntInRange(0, 8)):
        content[data.ConsumeIntInRange(0, len(content) - 1)] = data.ConsumeIntInRange(0, 255)
    return bytes(content[: data.ConsumeIntInRange(0, len(content))] if data.ConsumeIntInRange(0, 9) == 1 else content)


def encoders():
    """One for each chat format, with SmolLM2's vocabulary."""
    folder = str(parts.smollm2())
    for name in ("dolores", "chatml"):
        yield sft.load_encoder(folder, folder, name)


ENCODERS = list(encoders())
# SmolLM2's byte-level vocabulary has no token for these characters' bytes: what holds one cannot come back.
UNSAYABLE = re.compile("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")
LINE = re.compile(re.escape(FILE) + r"(:\d+)?: .+; .+")


def check_reading():
    """The conversations of FILE, sound, or none where it is refused; all that is said about it fits on a line."""

    try:
        read = list(sft.read_conversations([FILE], READER))
    except sft.InputError as error:
        assert LINE.fullmatch(str(error)) and str(error).isprintable() and len(str(error)) < 400, str(error)
        return []
    for finding in (finding for conversation in read for finding in conversation.findings):
        assert finding.file == FILE and finding.line > 0 and finding.kind and len(finding.text) < 400, finding
        assert finding.level == "note" or finding.text.isprintable()
        assert finding.level != "error" or LINE.fullmatch(str(finding)), finding
    found = [conversation for conversation in read if all(f.level != "error" for f in conversation.findings)]
    for conversation in found:
        roles = [turn.role for turn in conversation.turns]
        assert set(roles) <= set(sft.ROLES) and roles[-1] == "assistant"
        assert next(role for role in roles if role != "system") == "user"
        assert all(one != other for one, other in pairwise(roles))
        assert all(turn.content and turn.content == turn.content.strip() for turn in conversation.turns)
    return [conversation.turns for conversation in found]


def check_encoding(encode: sft.Encoder, conversations: list):
    """Control tokens only where the format puts them, trained only what the assistant says, and the text comes back."""
    chat, control = encode.chat, encode.special_ids
    for turns, (ids, labels) in zip(conversations, encode(conversations), strict=True):
        rendered = [(chat.before[turn.role], turn.content, chat.after[turn.role]) for turn in turns]
        framed = [bit for before, _, after in rendered for bit in encode.special.findall(before + after)]
        assert [i for i in ids.tolist() if i in control.values()] == [control[bit] for bit in framed]
        trained = ids[labels != sft.IGNORE].tolist()
        assert (labels[labels != sft.IGNORE] == ids[labels != sft.IGNORE]).all()
        if not any(UNSAYABLE.search(turn.content) for turn in turns):
            answers = "".join(
                turn.content + chat.eos_token for turn in turns if turn.role == "assistant" and turn.trained
            )
            assert encode.tokenizer.decode(trained, skip_special_tokens=False) == answers
            assert encode.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "".join(map("".join, rendered))


def one_input(raw: bytes):
    """Read and encode one file; an exception is a finding."""
    Path(FILE).write_bytes(file_content(raw))
    conversations = check_reading()
    for encode in ENCODERS:
        check_encoding(encode, conversations)


if __name__ == "__main__":
    if KIND not in ("chatml", "messages", "parquet"):
        sys.exit(__doc__)
    atheris.Setup([sys.argv[0], "-timeout=10", "-max_len=600", "-len_control=0", *sys.argv[2:]], one_input)
    atheris.Fuzz()
