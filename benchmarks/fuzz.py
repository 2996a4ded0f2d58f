#!/usr/bin/env python3
"""Coverage-guided fuzzing of the data readers and the encoder, on SmolLM2's vocabulary. Needs atheris (PyPI).

    python benchmarks/fuzz.py chatml -runs=1000000          # or messages, or parquet; further options are libFuzzer's

Whatever a file holds: the readers yield sound conversations or raise InputError with one printable line; no content
becomes a control token; exactly the answers and their end tokens are trained; the ids decode to the text again, where
the vocabulary has a token for each of its bytes. The fuzzer starts from sound files and puts in pieces of its
dictionary; an input that begins with = holds the contents of a sound file. One that breaks this, or takes ten seconds,
is kept as crash-* or timeout-* in the working directory: give its name as an option to see it again.
"""

import io
import json
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import llama  # noqa: F401 - makes the trainer importable

try:
    import atheris
except ImportError:
    sys.exit("atheris is missing: pip install atheris (it is in no requirements file: only this script needs it)")

with atheris.instrument_imports(include=["train_sft_dolores", "json"]):
    import train_sft_dolores as sft

import parts
import pyarrow.parquet

# What the fuzzer puts into its inputs; in rows these, the keys and the values as JSON.
TAGS = (*sft.ROLE_NAMES, "endoftext", "im_start", "im_end", "usr", "User", "eot_id", "é")
PIECES = [*(f"<|{name}|>" for name in TAGS), "<|im_start|>user\n", "<|im_start|> assistant \n", "<|im_end|>\n", "\n\n", "\r\n",
          "\\<|user|>", "\\\\<|im_end|>", "\u200b<|user|>", "<|user", "|user|>", "<| user |>", "<user|>", "\0", "\ufeff",
          "\u202e", "\x85", "\u2028", "\x1b[2J", "Ã©", "e\u0301", "🙂", "\U0010ffff", "{{ x }}", "<s>"]  # fmt: skip
KEYS = ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "role", "content",
        "from", "value", "type", "text", "weight", "loss", "train", "label", "images", "tool_calls", "name", "data"]  # fmt: skip
VALUES = ["user", "assistant", "human", "gpt", "tool", "", "\ud800", None, True, 0, -1.5, 10**30, float("nan"), [], {}]
QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": QA}] * 9), PARQUET := io.BytesIO())
CONTENTS = b"=q\n\na <|user|>\n\nq\n<|im_end|>\n\na"
SEEDS = {
    "chatml": [CONTENTS, b"<|system|>\ns\n<|user|>\nq\n<|assistant|>\na\n<|user|>\nq\n<|assistant|>\na\n",
               b"<|im_start|>user\nq\n<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|endoftext|>\n"],
    "messages": [CONTENTS, json.dumps([{"messages": QA + QA}]).encode(), b'{"prompt": "q", "completion": "a"}\n' * 2,
                 b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}\n' * 2],
    "parquet": [PARQUET.getvalue()],
}  # fmt: skip


def sound_file(contents: str, kind: str) -> bytes:
    """A conversation of these contents, each up to an empty line, so that what comes after the reader is reached too."""
    said = [(("user", "assistant")[i % 2], text.strip() or "q") for i, text in enumerate(contents.split("\n\n"))]
    said += [("assistant", "a")] if len(said) % 2 else []
    if kind == "messages":
        return json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}).encode()
    escaped = [(role, re.sub(r"(^\\*<\||\\*<\|im_end\|>)", r"\\\1", text, flags=re.MULTILINE)) for role, text in said]
    return "".join(f"<|{role}|>\n{text}\n" for role, text in escaped).encode()


def check_reading(file: str, reader: str) -> list:
    """The conversations of a file, sound, or none where it is refused; all that is said about it fits on a line."""
    place = re.compile(re.escape(file) + r"(:\d+)?: .+; .+")
    try:
        read = list(sft.read_conversations([file], reader))
    except sft.InputError as error:
        assert place.fullmatch(str(error)) and str(error).isprintable() and len(str(error)) < 400, str(error)
        return []
    for finding in (finding for conversation in read for finding in conversation.findings):
        assert finding.file == file and finding.line > 0 and finding.kind and len(finding.text) < 400, finding
        assert finding.level == "note" or finding.text.isprintable()
        assert finding.level != "error" or place.fullmatch(str(finding)), finding
    found = [c.turns for c in read if all(finding.level != "error" for finding in c.findings)]
    for turns in found:
        roles = [turn.role for turn in turns]
        assert set(roles) <= set(sft.ROLES) and roles[-1] == "assistant"
        assert next(role for role in roles if role != "system") == "user"
        assert all(one != other for one, other in pairwise(roles))
        assert all(turn.content and turn.content == turn.content.strip() for turn in turns)
    return found


# SmolLM2's byte-level vocabulary has no token for these characters' bytes: what holds one cannot come back.
UNSAYABLE = re.compile("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")


def check_encoding(encode: sft.Encoder, conversations: list) -> None:
    """Control tokens only where the format puts them, trained only what the assistant says, and the text comes back."""
    chat, control = encode.chat, encode.special_ids
    for turns, (ids, labels) in zip(conversations, encode(conversations), strict=True):
        rendered = [(chat.before[turn.role], turn.content, chat.after[turn.role]) for turn in turns]
        framed = [bit for before, _, after in rendered for bit in encode.special.findall(before + after)]
        assert [i for i in ids.tolist() if i in control.values()] == [control[bit] for bit in framed]
        trained = labels != sft.IGNORE
        assert (labels[trained] == ids[trained]).all()
        if not any(UNSAYABLE.search(turn.content) for turn in turns):
            answers = [turn.content + chat.eos_token for turn in turns if turn.role == "assistant" and turn.trained]
            decode = encode.tokenizer.decode
            assert decode(ids[trained].tolist(), skip_special_tokens=False) == "".join(answers)
            assert decode(ids.tolist(), skip_special_tokens=False) == "".join(map("".join, rendered))


def main() -> None:
    kind = "".join(sys.argv[1:2])
    if kind not in SEEDS:
        sys.exit(__doc__)
    folder, base = Path(tempfile.mkdtemp(prefix="fuzz")), str(parts.smollm2())
    file = folder / ("d.parquet" if kind == "parquet" else "d")
    encoders = [sft.load_encoder(base, base, name) for name in ("dolores", "chatml")]
    entries = [*PIECES, *map(json.dumps, [*PIECES, *KEYS, *VALUES])]
    escaped = ("".join(f"\\x{byte:02x}" for byte in entry.encode()) for entry in entries)
    (folder / "dictionary").write_text("".join(f'"{entry}"\n' for entry in escaped))
    (folder / "corpus").mkdir()
    for number, content in enumerate(SEEDS[kind]):
        (folder / "corpus" / str(number)).write_bytes(content)

    def one_input(raw: bytes) -> None:
        file.write_bytes(sound_file(raw[1:].decode("utf-8", "replace"), kind) if raw[:1] == b"=" else raw)
        conversations = check_reading(str(file), "chatml" if kind == "chatml" else "messages")
        for encode in encoders:
            check_encoding(encode, conversations)

    length = "-max_len=4000" if kind == "parquet" else "-max_len=600"
    options = ["-timeout=10", "-len_control=0", length, f"-dict={folder}/dictionary", *sys.argv[2:], f"{folder}/corpus"]
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
