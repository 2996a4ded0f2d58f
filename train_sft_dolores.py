#!/usr/bin/env python3
"""Fine-tune Dolores v5 from Llama-3.1-8B-Instruct on one 24 GB card: one file, one command.

    python3 train_sft_dolores.py                      # the documented run: train.chatml, NF4 + LoRA
    python3 train_sft_dolores.py --dry-run            # only look at the data
    python3 train_sft_dolores.py --resume             # go on after a stop

train.chatml -> turns -> (input_ids, labels) -> packed rows -> NF4 base + LoRA -> Trainer -> --output.
Then `python3 merge_lora.py` makes of base and adapter a folder that Ollama reads.
The file reads top down in that order; down to "Looking" only `collate` imports torch.
"""

import argparse
import contextlib
import errno
import glob
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from difflib import get_close_matches
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROLES = ("system", "user", "assistant")
IGNORE = -100  # the label that the loss passes over, torch's own default


class InputError(Exception):
    """What the user can mend: one line, `place: what; what to do`, exit status 2."""


# ---- The chat format, said once ------------------------------------------------------------------


class ChatFormat(NamedTuple):
    """What stands around a turn's content; from it come the training ids, the Jinja and the Go TEMPLATE."""

    header: str  # opens a turn, and, with role=assistant, the answer to be generated
    turn_end: str  # closes a system or user turn
    answer_end: str  # closes an assistant turn; its end token is trained
    eos_token: str  # what the model says when it has finished


FORMATS = {
    # Readable tags that cost no new tokens; {eos} is the end token of the base's own tokenizer.
    "dolores": ChatFormat("<|{role}|>\n", "\n", "{eos}\n", "{eos}"),
    "llama3": ChatFormat("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>", "<|eot_id|>"),
    "chatml": ChatFormat("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_end|>\n", "<|im_end|>"),
}


class Vocabulary(NamedTuple):
    """What the data side needs of a tokenizer; transformers' fast tokenizers have both by these names."""

    backend_tokenizer: object  # tokenizers.Tokenizer
    eos_token: str | None


def chat_format(name: str, tokenizer: Vocabulary) -> ChatFormat:
    """The format with this tokenizer's end token in it."""
    chat = ChatFormat(*(part.replace("{eos}", tokenizer.eos_token or "") for part in FORMATS[name]))
    if chat.eos_token not in special_tokens(tokenizer):
        raise InputError(
            f"--chat-format {name}: the model's vocabulary has no end token {chat.eos_token!r}; choose another format"
        )
    return chat


def special_tokens(tokenizer: Vocabulary) -> dict[str, int]:
    """Control tokens by their text: what contents must never forge."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}


def chat_template(chat: ChatFormat) -> str:
    """The same format as Jinja, for `chat_template.jinja` and tokenizer.apply_chat_template."""
    before, after = (json.dumps(part, ensure_ascii=False) for part in chat.header.split("{role}"))
    turn_end, answer_end = (json.dumps(part, ensure_ascii=False) for part in (chat.turn_end, chat.answer_end))
    return (
        f"{{% for message in messages %}}{{{{ {before} + message['role'] + {after} + message['content'] }}}}"
        f"{{{{ {answer_end} if message['role'] == 'assistant' else {turn_end} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(chat.header.format(role='assistant'))} }}}}{{% endif %}}"
    )


# ---- The knobs -----------------------------------------------------------------------------------


def number(kind, low, high=float("inf"), low_open=False):
    """An argparse type: an int or float within bounds, refused with one clear line."""

    def parse(text):
        value = kind(text)
        if not (low < value if low_open else low <= value) or not value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if low_open else 'at least'} {low}"
                + ("" if high == float("inf") else f" and at most {high}")
            )
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def checkpointing(text):
    """--gradient-checkpointing's value: auto, all, none or a number of layers."""
    if text in ("auto", "all", "none"):
        return text
    with contextlib.suppress(ValueError):
        if int(text) >= 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, all, none or a number of layers")


SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
OPTIMIZERS = ("paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused")


class OneLineParser(argparse.ArgumentParser):
    """argparse with one line for a wrong flag, where it would print the whole usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_args(argv=None) -> argparse.Namespace:
    """The command line; every default is the documented run's."""
    parser = OneLineParser(
        usage="%(prog)s [options]",
        description="Fine-tune Dolores v5: assistant-only SFT with NF4 + LoRA on one 24 GB card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    count, positive = number(int, 1), number(float, 0, low_open=True)

    data = parser.add_argument_group("data")
    data.add_argument("--model", default="meta-llama/Llama-3.1-8B-Instruct", help="Hub name or local folder")
    data.add_argument("--train-files", nargs="+", default=["train.chatml"], help="files or globs")
    data.add_argument(
        "--input-format", choices=("chatml", "messages"), default="chatml", help="tags, or JSON and Parquet"
    )
    data.add_argument("--eval-files", nargs="+", default=[], help="held-out conversations, instead of --eval-fraction")
    data.add_argument("--eval-fraction", type=number(float, 0, 0.5), default=0.05, help="held out of the training data")
    data.add_argument("--chat-format", choices=tuple(FORMATS), default="dolores", help="what stands around a turn")
    data.add_argument("--max-length", type=number(int, 16), default=2048, help="tokens in a row")
    data.add_argument("--overlong", choices=("split", "drop", "error"), default="split", help="conversations above it")
    data.add_argument("--packing", action=switch, default=True, help="several whole conversations in a row")

    training = parser.add_argument_group("training")
    training.add_argument("--output", type=Path, default=Path("runs_dolores_v5/llama31_clean"), help="folder")
    training.add_argument("--epochs", type=positive, default=1.0, help="passes over the data")
    training.add_argument("--train-batch-size", type=count, default=1, help="rows at once")
    training.add_argument("--eval-batch-size", type=count, default=1, help="rows at once in evaluation")
    training.add_argument("--grad-accum", type=count, default=32, help="batches in an optimizer step")
    training.add_argument("--learning-rate", type=positive, default=1.5e-4, help="its peak")
    training.add_argument(
        "--lr-scheduler-type", choices=SCHEDULERS, default="cosine", metavar="NAME", help="%(choices)s"
    )
    training.add_argument("--warmup-ratio", type=number(float, 0, 0.99), default=0.03, help="share of all steps")
    training.add_argument("--max-grad-norm", type=number(float, 0), default=0.8, help="0: no clipping")
    training.add_argument(
        "--optim", choices=OPTIMIZERS, default="paged_adamw_8bit", metavar="NAME", help="one of %(choices)s"
    )
    training.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of everything random")

    lora = parser.add_argument_group("LoRA and precision")
    lora.add_argument("--lora-r", type=count, default=32, help="rank")
    lora.add_argument("--lora-alpha", type=positive, default=64.0, help="scale: alpha / r")
    lora.add_argument("--lora-dropout", type=number(float, 0, 0.99), default=0.05, help="on the adapters' input")
    lora.add_argument(
        "--lora-target-modules",
        default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        help="names of linear layers, with commas",
    )
    lora.add_argument("--bf16", action=switch, default=True, help="weights and activations in bfloat16, else float32")
    lora.add_argument("--bnb-nf4", action=switch, default=True, help="base weights in 4 bits (NF4, double quantised)")
    lora.add_argument(
        "--bnb-dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="NF4 computes in"
    )

    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--gradient-checkpointing",
        type=checkpointing,
        nargs="?",
        const="auto",
        default="auto",
        metavar="auto|all|none|N",
        help="layers that recompute their activations; auto: as many as the card needs",
    )
    memory.add_argument("--shard-base", action=switch, default=False, help="each card keeps a share of the base")
    memory.add_argument("--compile", action=switch, default=False, help="compile the layers with torch.compile")
    memory.add_argument(
        "--torch-memory-fraction",
        type=number(float, 0, 1, True),
        default=0.95,
        help="share of the card that may be used",
    )
    memory.add_argument("--cuda-alloc-expandable", action=switch, default=True, help="CUDA memory that grows in place")
    memory.add_argument(
        "--max-split-size-mb", type=number(int, 21), default=128, help="CUDA blocks, where not expandable"
    )

    looking = parser.add_argument_group("looking and keeping")
    looking.add_argument("--logging-steps", type=count, default=1, help="optimizer steps between log lines")
    looking.add_argument("--eval-steps", type=count, default=10, help="optimizer steps between evaluations")
    looking.add_argument("--save-steps", type=count, default=10, help="optimizer steps between checkpoints")
    looking.add_argument("--save-total-limit", type=count, default=5, help="checkpoints kept")
    looking.add_argument(
        "--early-stopping", type=count, metavar="N", help="stop after N evaluations without a better loss"
    )
    looking.add_argument("--sample-prompts", type=Path, help="file with one question a line; 'none' for none")
    looking.add_argument("--report-to", nargs="+", default=["none"], help="trackers such as tensorboard or wandb")
    looking.add_argument("--dry-run", action="store_true", help="look at the data and the memory plan, then end")
    looking.add_argument(
        "--preview", type=number(int, 0), default=0, metavar="N", help="show N rows with their mask, then end"
    )
    looking.add_argument("--json", type=Path, metavar="FILE", help="what --dry-run finds, for machines")
    looking.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    looking.add_argument("--force-resume", action="store_true", help="--resume although data or knobs have changed")
    looking.add_argument("--overwrite", action="store_true", help="throw away what --output holds")
    args = parser.parse_args(argv)
    args.lora_target_modules = [name.strip() for name in args.lora_target_modules.split(",") if name.strip()]
    args.resume |= args.force_resume
    args.dry_run |= bool(args.preview or args.json)
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.shard_base and args.compile:
        parser.error("--shard-base and --compile exclude each other")
    return args


# ---- Text -> turns -------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one role says, and the line where it begins."""

    role: str
    content: str  # stripped: white space at its edges would merge with the format's own tokens
    line: int


class Conversation(NamedTuple):
    """Turns that belong together, and where they stand."""

    turns: list[Turn]
    file: str
    line: int


NAME = r"[^|<>\s]{1,40}"
TAG = re.compile(rf"<\|{NAME}\|>")
LINE_TAG = re.compile(rf"<\|(?<![^\n]<\|)({NAME})\|>")  # at the start of a line; with ^ it would take 3.5 times as long
ESCAPED_TAG = re.compile(rf"(?<=\n)\\+<\|{NAME}\|>")  # not on the line of the turn's own tag
ESCAPED_IM_START = re.compile(r"\\+<\|im_start\|>")
IM_END = re.compile(r"(?<!\\)<\|im_end\|>")
# A tag's name at the start of a line between what may be a tag's edges, such as `<| user|>` or `<|user>`.
LIKE_TAG = re.compile(r"([<|｜/\s]*)(system|user|assistant|endoftext|im_start|im_end)(?!\w)([|｜>\s]*)", re.IGNORECASE)


def expand(patterns: list[str]) -> dict[str, str]:
    """The files of paths and globs, each once, in order, with their sha256."""
    found = lambda pattern: [] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))  # noqa: E731
    names = [name for pattern in patterns for name in found(pattern) or [pattern]]
    for name in names:
        if not os.path.isfile(name):
            raise InputError(f"{name}: no such file; give the path of a data file or a glob that matches one")
        try:
            with open(name, "rb") as file:
                empty = not file.read(1)
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror}); make it readable") from None
        if empty:
            raise InputError(f"{name}: the file is empty; write dialogues into it (README, data format)")
    return {name: sha256(name) for name in dict.fromkeys(names)}


def sha256(file: str) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def blocks(file: str):
    """Yield (number of the first line, text) of a UTF-8 file, a megabyte of whole lines; BOM and CRLF are accepted."""
    from tqdm import tqdm

    size, name, number = os.path.getsize(file), os.path.basename(file), 1
    bar = tqdm(total=size, desc=name, unit="B", unit_scale=True, delay=2, disable=no_bar(), leave=False)
    with open(file, "rb") as source, bar:
        while raw := source.read(1 << 20) + source.readline():
            bar.update(len(raw))
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                number += raw.count(b"\n", 0, error.start)
                raise InputError(
                    f"{file}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
                ) from None
            if number == 1:
                text = text.removeprefix("\ufeff")
            yield number, text.replace("\r\n", "\n")
            number += raw.count(b"\n")


def numbered_lines(file: str):
    """Yield (number, line) of a UTF-8 file, without line ends."""
    for number, text in blocks(file):
        yield from enumerate(text.removesuffix("\n").split("\n"), number)


def tagged(file: str):
    """Yield (number, name, text): the tag that begins line `number`, and all that follows up to the next such line."""
    start, name, pieces = 1, None, []
    for number, text in blocks(file):
        at = 0
        for tag in LINE_TAG.finditer(text):
            begin = tag.start()
            pieces.append(text[at:begin])
            yield start, name, "".join(pieces)
            number += text.count("\n", at, begin)
            start, name, at, pieces = number, tag[1], tag.end(), []
        pieces.append(text[at:])
    yield start, name, "".join(pieces)


def no_bar() -> bool:
    """Progress bars are for terminals, and of the first process only."""
    return not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"


def shortened(value) -> str:
    """repr, cut: an error must not throw a file into the terminal."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"


def visible(text: str, keep="") -> str:
    """Control characters written as escapes: what a file holds must not steer the terminal."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def nearest(name: str, choices) -> str:
    """`did you mean …?` where a choice is near, else the list of them."""
    near = get_close_matches(name[:60].lower(), choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(choices)}"


def tag_hint(name: str) -> str:
    """What to write instead of a tag whose name is no role."""
    near = get_close_matches(name.lower(), ROLES, n=1, cutoff=0.6)
    return f"did you mean <|{near[0]}|>?" if near else f"write \\<|{visible(name)[:60]}|> if it is text"


def read_chatml(file: str, warn):
    """Yield the conversations of a ChatML file: each starts at its start, a system turn or a line `<|endoftext|>`."""
    turns = []
    for turn in chatml_turns(file, warn):
        if turns and turn.role in ("system", "endoftext"):
            yield checked(turns, file, warn)
            turns = []
        if turn.role != "endoftext":
            turns.append(turn)
    if turns:
        yield checked(turns, file, warn)


def chatml_turns(file: str, warn):
    """Yield the turns of both dialects, and one of role `endoftext` for each such line.

    Role tags at the start of a line (`<|user|>`, content on the same line or the next ones), or
    `<|im_start|>user` … `<|im_end|>`. A backslash before a tag makes it text.
    """
    opened, lines = None, []  # a turn that <|im_end|> has not closed yet, and its content
    for number, name, text in tagged(file):
        if name == "im_start":
            if opened:
                break
            role, _, text = text.partition("\n")
            role = role.strip()
            if role not in ROLES:
                raise InputError(f"{file}:{number}: unknown role {shortened(role)}; {nearest(role, ROLES)}")
            opened, lines, name, number = Turn(role, "", number), [], None, number + 1
        if opened:  # everything up to <|im_end|> is text
            part = f"<|{name}|>{text}" if name else text
            end = IM_END.search(part)
            text = part[: end.start()] if end else part
            lines.append(plain(text.replace("\\<|im_end|>", "<|im_end|>"), number, ESCAPED_IM_START, file, warn))
            if end:
                yield opened._replace(content="".join(lines).strip())
                opened = None
                number += text.count("\n")
                only_blanks(part[end.end() :], number, file, "after <|im_end|>; put it inside a turn")
        elif name in ROLES:
            yield Turn(name, plain(text, number, ESCAPED_TAG, file, warn).strip(), number)
        elif name == "endoftext":
            yield Turn(name, "", number)
            only_blanks(text, number, file, "after <|endoftext|>; put the separator alone on its line")
        elif name:
            raise InputError(f"{file}:{number}: unknown role tag <|{visible(name)[:60]}|>; {tag_hint(name)}")
        else:
            only_blanks(text, number, file)
    if opened:
        raise InputError(f"{file}:{opened.line}: this turn is not closed; end it with <|im_end|>")


def only_blanks(text: str, number: int, file: str, after=None):
    """Refuse text outside of turns; `after` says what to do with it on the first of these lines."""
    if text.strip():
        below = text[: -len(text.lstrip())].count("\n")
        what = f"text {after}" if after and not below else "text outside of a turn; begin with a tag such as <|user|>"
        raise InputError(f"{file}:{number + below}: {what}")


def plain(text: str, number: int, escaped: re.Pattern, file: str, warn) -> str:
    """Lines of a turn without the backslash that makes a tag text; what may be meant as a tag is warned about."""
    if "|" not in text and "｜" not in text:  # almost always
        return text
    lines, at = text.split("\n"), 0
    for i, line in enumerate(lines):
        if escaped.match(text, at):
            lines[i] = line[1:]
        elif found := TAG.search(line):
            warn(file, number + i, "tag", f"{visible(found[0])[:60]} inside a turn is text, no tag")
        elif (found := LIKE_TAG.match(line)) and {*"<>"} & {*found[0]} and {*"|｜"} & {*found[0]}:
            shown, name = shortened(found[0].strip()), found[2].lower()
            warn(file, number + i, "tag", f"{shown} looks like a tag; write <|{name}|> if it is one")
        at += len(line) + 1
    return "\n".join(lines)


SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def records(file: str):
    """Yield (row number, dict) of a JSON-lines, JSON or Parquet file."""
    if file.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            batches = parquet.ParquetFile(file).iter_batches(1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        except UnicodeDecodeError:
            raise InputError(f"{file}: a text in it is not UTF-8; write the file anew") from None
        except (pyarrow.ArrowInvalid, OSError):
            raise InputError(f"{file}: not a Parquet file; give JSON lines, JSON or Parquet") from None
        return
    lines = numbered_lines(file)
    first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    number = first[0]
    try:
        if first[1].lstrip().startswith("["):
            yield from enumerate(json.loads("\n".join([first[1], *(line for _, line in lines)])), 1)
            return
        for number, line in (pair for source in ([first], lines) for pair in source):
            if line.strip():
                yield number, json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter where it is nested too deeply
        if isinstance(error, json.JSONDecodeError) and first[1].lstrip().startswith("["):
            number = first[0] + error.lineno - 1
        what = getattr(error, "msg", None) or first_line(error)
        raise InputError(f"{file}:{number}: not JSON ({what}); give one object a line, or one list") from None


def read_messages(file: str, warn):
    """Yield the conversations of `messages` data: OpenAI's messages or ShareGPT's conversations."""
    for number, record in records(file):
        place = f"{file}:{number}"
        messages = isinstance(record, dict) and (record.get("messages") or record.get("conversations"))
        if not isinstance(messages, list):
            raise InputError(f"{place}: no list 'messages' (or 'conversations'); each row is one conversation")
        turns = []
        for message in messages:
            if not isinstance(message, dict):
                raise InputError(f"{place}: a message is no object; write {{'role': …, 'content': …}}")
            role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
            if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
                content = "".join(str(part.get("text", "")) for part in content)
            if not isinstance(role, str) or role not in SHAREGPT:
                raise InputError(f"{place}: unknown role {shortened(role)}; {nearest(str(role), ROLES)}")
            if not isinstance(content, str):
                raise InputError(f"{place}: the content of a {role} message is no text; only text can be trained on")
            if re.search("[\ud800-\udfff]", content):
                raise InputError(f"{place}: a lone surrogate in a {role} message; repair the text's encoding")
            if found := TAG.search(content):
                warn(file, number, "tag", f"{visible(found[0])[:60]} inside a turn is text, no tag")
            turns.append(Turn(SHAREGPT[role], content.strip(), number))
        yield checked(turns, file, warn, start=number)


def checked(turns: list[Turn], file: str, warn, start=None) -> Conversation:
    """One conversation, neighbours of a role joined as Ollama joins them; raise on what cannot be trained."""
    start = start or turns[0].line
    joined = []
    for turn in turns:
        if not turn.content:
            if turn.role != "system":
                raise InputError(f"{file}:{turn.line}: empty {turn.role} turn; fill it or delete it")
            warn(file, turn.line, "empty system", "the empty system turn is left out")
        elif joined and joined[-1][0].role == turn.role:
            joined[-1].append(turn)
        else:
            joined.append([turn])
    joined = [
        same[0] if len(same) == 1 else same[0]._replace(content="\n\n".join(turn.content for turn in same))
        for same in joined
    ]
    if not any(turn.role == "assistant" for turn in joined):
        raise InputError(f"{file}:{start}: a conversation without an assistant turn; nothing in it can be trained")
    first = next(turn for turn in joined if turn.role != "system")
    if first.role == "assistant":
        raise InputError(f"{file}:{first.line}: the assistant speaks first; put a user turn before it")
    if joined[-1].role != "assistant":
        warn(file, joined[-1].line, "trailing turn", f"the {joined[-1].role} turn at the end has no answer: left out")
        while joined[-1].role != "assistant":
            joined.pop()
    return Conversation(joined, file, start)


def read_conversations(files, input_format: str, warn=lambda *_: None):
    """Yield the conversations of all files, one at a time; only a JSON list is read whole."""
    reader = {"chatml": read_chatml, "messages": read_messages}[input_format]
    for file in files:
        found = False
        for conversation in reader(file, warn):
            found = True
            yield conversation
        if not found:
            raise InputError(f"{file}: no conversation in it; see the README on the data format")


# ---- Turns -> tokens -----------------------------------------------------------------------------


class Sample(NamedTuple):
    """A conversation, or a part of one, as tokens."""

    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32: the id where it is trained, else -100
    digest: int  # of the conversation
    file: str
    line: int


class Encoder:
    """Turns -> token ids, such that what is trained is what a runtime will send.

    A runtime encodes the text between two special tokens as one string; so do we, and the answer
    apart from its prompt: then the prompt's ids are a prefix of the training ids. Special tokens
    come from the format alone: contents are encoded with encode_special_tokens, so that a user's
    `<|eot_id|>` stays text.
    """

    def __init__(self, tokenizer: Vocabulary, chat: ChatFormat):
        self.tokenizer, self.chat = tokenizer.backend_tokenizer, chat
        self.tokenizer.no_padding()  # a tokenizer saved after padded training would pad and cut here too
        self.tokenizer.no_truncation()
        self.start = self.tokenizer.encode("").ids[:1]  # BOS, where this tokenizer begins with one
        self.special_ids = special_tokens(tokenizer)
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self.special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        split = lambda text: [self.special_ids.get(bit, bit) for bit in self.special.split(text) if bit]  # noqa: E731
        end = self.special_ids[chat.eos_token]
        self.before = {role: [(bit, False) for bit in split(chat.header.format(role=role))] for role in ROLES}
        self.behind = {role: [(bit, False) for bit in split(chat.turn_end)] for role in ROLES}
        self.behind["assistant"] = [(bit, bit == end) for bit in split(chat.answer_end)]

    def pieces(self, turns: list[Turn]):
        """Yield (text or special token's id, trained?) of a conversation."""
        yield from ((bos, False) for bos in self.start)
        text = ""  # what is open, up to the next special token or answer
        for role, content, _ in turns:
            for piece, trained in (*self.before[role], (content, role == "assistant"), *self.behind[role]):
                if isinstance(piece, str) and not trained:
                    text += piece
                    continue
                if text:
                    yield text, False
                yield piece, trained
                text = ""
        if text:
            yield text, False

    def __call__(self, conversations: list[list[Turn]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input_ids, labels), int32 [T] each, of each conversation; one call of the tokenizer for all."""
        pieces = [list(self.pieces(turns)) for turns in conversations]
        texts = [text for parts in pieces for text, _ in parts if isinstance(text, str)]
        self.tokenizer.encode_special_tokens = True  # transformers sets it anew in each call of its own
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        ids = [next(encoded).ids if isinstance(piece, str) else [piece] for parts in pieces for piece, _ in parts]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        input_ids = np.fromiter(chain.from_iterable(ids), np.int32, lengths.sum())
        trained = np.repeat([trained for parts in pieces for _, trained in parts], lengths)
        labels = np.where(trained, input_ids, np.int32(IGNORE))
        ends = np.cumsum([0, *lengths])[np.cumsum([0, *map(len, pieces)])]
        return [(input_ids[begin:end], labels[begin:end]) for begin, end in pairwise(ends)]


def split_conversation(turns: list[Turn], encode: Encoder, max_length: int):
    """Continue a long conversation in further samples at turn boundaries, each with the system turn again.

    Returns ([(input_ids, labels)], [turn that begins an exchange which cannot fit]).
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    exchanges = []
    for turn in turns[len(system) :]:
        if not exchanges or (turn.role != "assistant" and exchanges[-1][-1].role == "assistant"):
            exchanges.append([])
        exchanges[-1].append(turn)
    head = len(encode([system])[0][0])
    if head >= max_length:  # nothing fits behind it; encoding it with each exchange would take the square of the time
        return [], [exchange[0] for exchange in exchanges]
    sizes = [len(ids) - head for ids, _ in encode([system + exchange for exchange in exchanges])]
    samples, lost, first = [], [], 0
    while first < len(exchanges):
        last, size = first, head
        while last < len(exchanges) and size + sizes[last] <= max_length:
            size += sizes[last]
            last += 1
        # Sizes add up but for a token at a seam, in some tokenizers: the whole is measured again.
        while last > first:
            ids, labels = encode([system + list(chain(*exchanges[first:last]))])[0]
            if len(ids) <= max_length:
                samples.append((ids, labels))
                break
            last -= 1
        if last == first:
            lost.append(exchanges[first][0])
            last += 1
        first = last
    return samples, lost


def batches(conversations, characters=1 << 21):
    """Yield lists of conversations of about so many characters: enough for the tokenizer to use every core."""
    batch, size = [], 0
    for conversation in conversations:
        batch.append(conversation)
        size += sum(len(turn.content) for turn in conversation.turns)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Ten million blanks make Llama 3.1's tokenizer panic. Tried where a run begins only, so in linear time.
BLANKS = re.compile(r"(?<![^\S\r\n])[^\S\r\n]{1000000}")


def encode_conversations(conversations, encode: Encoder, max_length: int, overlong: str, warn):
    """Yield lists of Samples; none is longer than max_length."""
    for batch in batches(conversations):
        for turns, file, _ in batch:
            for turn in turns:
                if len(turn.content) > 1_000_000 and BLANKS.search(turn.content):
                    raise InputError(f"{file}:{turn.line}: a million blanks in a row; delete them")
        samples = []
        for conversation, (ids, labels) in zip(batch, encode([c.turns for c in batch]), strict=True):
            turns, file, line = conversation
            origin = digest(turns), file, line
            if len(ids) <= max_length:
                samples.append(Sample(ids, labels, *origin))
            elif overlong == "error":
                raise InputError(
                    f"{file}:{line}: {len(ids)} tokens, above --max-length {max_length}; shorten it or use --overlong split"
                )
            elif overlong == "drop":
                warn(file, line, "overlong", f"dropped: {len(ids)} tokens")
            else:
                parts, lost = split_conversation(turns, encode, max_length)
                samples += [Sample(*part, *origin) for part in parts]
                if len(parts) > 1:
                    warn(file, line, "overlong", f"{len(ids):,} tokens: split into {len(parts)}")
                for turn in lost:
                    warn(file, turn.line, "overlong", "dropped: this exchange alone is longer than a row")
        yield samples


# ---- Tokens -> rows ------------------------------------------------------------------------------


def digest(turns: list[Turn]) -> int:
    """63 bits that tell conversations apart by what is said in them."""
    said = "\0".join([text for role, content, _ in turns for text in (role, content)])
    return int.from_bytes(hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def kept(name: str, depends_on: list, make) -> Path:
    """A folder in datasets' cache, made once for all that it depends on, by one process at a time.

    `make(folder)` fills it beside; it appears under its name only when complete, and what a process that
    was killed has left is cleared by the next.
    """
    import fcntl

    from huggingface_hub.constants import HF_HOME

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or f"{HF_HOME}/datasets") / "dolores_sft"
    key = repr([Path(__file__).read_text(encoding="utf-8"), *depends_on])
    folder = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    make(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return folder


def prepare(files: dict[str, str], args, encode: Encoder):
    """All samples of these files (name: sha256) as a memory-mapped datasets.Dataset, with what was warned about.

    Columns: input_ids and labels (lists of int32), trained (how many labels are), digest, file, line.
    A second start with the same files, tokenizer, format and length finds them in the cache.
    """
    import datasets

    def make(folder: Path):
        warnings = []
        conversations = read_conversations(files, args.input_format)
        warn = lambda *warning: warnings.append(warning)  # noqa: E731
        samples = encode_conversations(conversations, encode, args.max_length, args.overlong, warn)
        write_arrow(samples, folder / "samples.arrow")
        write_json(folder / "warnings.json", warnings)

    knobs = [encode.tokenizer.to_str(), encode.chat, args.input_format, args.max_length, args.overlong]
    folder = kept("samples", [*knobs, *files.items()], make)
    return datasets.Dataset.from_file(str(folder / "samples.arrow")), json.loads((folder / "warnings.json").read_text())


def write_arrow(batches, file: Path):
    """Write batches of Samples as an Arrow stream; the arrays are copied, never turned into objects."""
    import pyarrow as pa

    tokens = pa.large_list(pa.int32())
    schema = pa.schema({"input_ids": tokens, "labels": tokens, "trained": pa.int32(), "digest": pa.int64(),
                        "file": pa.string(), "line": pa.int32()})  # fmt: skip
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            ends = np.cumsum([0] + [len(sample.input_ids) for sample in batch], dtype=np.int64)
            columns = [
                pa.LargeListArray.from_arrays(ends, np.concatenate([np.zeros(0, np.int32), *arrays]))
                for arrays in ([sample.input_ids for sample in batch], [sample.labels for sample in batch])
            ]
            trained = [np.count_nonzero(sample.labels != IGNORE) for sample in batch]
            others = [trained, *([sample[i] for sample in batch] for i in (2, 3, 4))]
            columns += [pa.array(other, field.type) for other, field in zip(others, list(schema)[2:], strict=True)]
            stream.write_batch(pa.record_batch(columns, schema))


def measure(samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(digest, tokens, trained tokens) of each sample: int64 [N] each; the tokens themselves are not touched."""
    from pyarrow.compute import list_value_length

    columns = [(np.zeros(0, np.int64),) * 3]
    for batch in samples.with_format("arrow").iter(10_000):
        lengths = list_value_length(batch["input_ids"]).to_numpy()
        columns.append((batch["digest"].to_numpy(), lengths, batch["trained"].to_numpy().astype(np.int64)))
    return tuple(map(np.concatenate, zip(*columns, strict=True)))


def hold_out(digests: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: which samples are held out; all parts and copies of a conversation fall on one side."""
    conversations = np.unique(digests)
    size = min(max(1, round(fraction * len(conversations))), len(conversations) - 1) if fraction else 0
    return np.isin(digests, np.random.default_rng(seed).permutation(conversations)[:size])


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Best-fit-decreasing: int64 arrays of sample numbers, one a row of at most `capacity` tokens.

    The rows with room are kept in stacks by their free space; the smallest space that is large
    enough is the lowest set bit of one integer, so a million samples take seconds.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of, rows, free, spaces = np.empty(len(lengths), np.int64), 0, {}, 0
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = free[space].pop()
            if not free[space]:
                spaces ^= 1 << space
        else:
            space, row, rows = capacity, rows, rows + 1
        row_of[sample] = row
        if space > length:
            free.setdefault(space - length, []).append(row)
            spaces |= 1 << (space - length)
    if not rows:
        return []
    by_row = np.argsort(row_of, kind="stable")
    return np.split(by_row, np.searchsorted(row_of[by_row], np.arange(1, rows)))


class Rows:
    """A sequence of rows, each assembled when asked for: the samples of one row, from disk."""

    def __init__(self, samples, plan: list[np.ndarray]):
        self.samples, self.plan = samples.with_format("numpy"), plan

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, row: int) -> dict:
        return self.samples[self.plan[row]]

    def longest(self) -> dict:
        """The row of most tokens, which needs most memory."""
        lengths = measure(self.samples)[1]
        return self[max(range(len(self)), key=lambda row: lengths[self.plan[row]].sum())]


def collate(rows: list[dict]) -> dict:
    """Rows -> one batch without padding: all their documents one behind the other, [1, T].

    input_ids, position_ids [1, T] int64 (positions restart at each document); cu_seq_lens_q
    [documents + 1] int32 and max_length_q, for attention within documents; logits_to_keep [N] int64,
    the places whose next token is trained, and labels = shift_labels [1, N] those tokens; documents,
    their (file, line), for messages. No attention_mask: transformers would then join the documents.
    """
    import torch

    documents = [ids for row in rows for ids in row["input_ids"]]
    labels = np.concatenate([labels for row in rows for labels in row["labels"]])
    lengths = [len(ids) for ids in documents]
    keep = np.flatnonzero(labels[1:] != IGNORE)
    targets = torch.from_numpy(labels[keep + 1].astype(np.int64))[None]
    return {
        "input_ids": torch.from_numpy(np.concatenate(documents).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        "cu_seq_lens_q": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "max_length_q": max(lengths),
        "logits_to_keep": torch.from_numpy(keep),
        "labels": targets,
        "shift_labels": targets,
        "documents": [f"{file}:{line}" for row in rows for file, line in zip(row["file"], row["line"], strict=True)],
    }


# ---- Looking -------------------------------------------------------------------------------------

MOJIBAKE = re.compile("Ã[\u0080-\u00bf©¨ª«´§¹]|â€|Â[«»°\u00a0]|\ufffd")
LONG_TURN = 20_000  # characters


def survey(files: dict[str, str], input_format: str) -> dict:
    """Counts and warnings [file, line, kind, text] of the data; raises on what is wrong. Kept like the samples."""
    make = lambda folder: write_json(folder / "survey.json", survey_anew(files, input_format))  # noqa: E731
    folder = kept("survey", [input_format, *files.items()], make)
    return json.loads((folder / "survey.json").read_text(encoding="utf-8"))


def survey_anew(files, input_format: str) -> dict:
    """Read and check everything once; nothing is kept but the counts."""
    turns, exchanges, seen, warnings, conversations, characters = Counter(), Counter(), {}, [], 0, 0

    def warn(*warning):
        warnings.append(warning)

    for conversation in read_conversations(files, input_format, warn):
        conversations += 1
        exchanges[sum(turn.role == "assistant" for turn in conversation.turns)] += 1
        place = f"{conversation.file}:{conversation.line}"
        first = seen.setdefault(digest(conversation.turns), place)
        if first != place:
            warn(conversation.file, conversation.line, "duplicate", f"the same conversation as {first}")
        for role, content, line in conversation.turns:
            turns[role] += 1
            characters += len(content)
            if found := MOJIBAKE.search(content):
                warn(conversation.file, line, "mojibake", f"{found[0]!r} looks like text decoded wrongly")
            if len(content) > LONG_TURN:
                warn(conversation.file, line, "long", f"a turn of {len(content):,} characters")
    return {
        "files": list(files),
        "conversations": conversations,
        "turns": dict(turns),
        "exchanges": dict(sorted(exchanges.items())),
        "characters": characters,
        "warnings": warnings,
    }


def print_survey(found: dict, shown=5):
    """The survey for people, and the first places of each kind of warning."""
    turns, grouped = found["turns"], Counter()
    for number, count in found["exchanges"].items():
        grouped["3-8" if 3 <= int(number) <= 8 else "9+" if int(number) > 8 else number] += count
    names = found["files"]
    say("files", ", ".join(names[:shown]) + (f", … and {len(names) - shown:,} more" if len(names) > shown else ""))
    say("data", f"{found['conversations']:,} conversations, {found['characters']:,} characters")
    say("turns", ", ".join(f"{turns.get(role, 0):,} {role}" for role in ROLES))
    say("exchanges", ", ".join(f"{grouped[key]:,} with {key}" for key in ("1", "2", "3-8", "9+") if grouped[key]))
    print_warnings(found["warnings"], shown)


def print_warnings(warnings: list, shown=5):
    """Each kind with its count and its first places."""
    for kind, count in Counter(kind for _, _, kind, _ in warnings).items():
        say("warning", f"{count:,} x {kind}")
        for file, line, _, text in islice((w for w in warnings if w[2] == kind), shown):
            print(wrapped(f"  {file}:{line}: {text}", 4))
        if count > shown:
            print(f"  … and {count - shown:,} more")


def say(name: str, text: str):
    """One aligned paragraph for people."""
    print(wrapped(f"{name:<10} {text}", 11), flush=True)


def wrapped(text: str, indent: int) -> str:
    """Lines of 80 columns; paths and flags stay whole."""
    return textwrap.fill(text, 80, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def print_tokens(counts: dict, lengths: np.ndarray, args):
    """Tokens, lengths, rows and steps; and what to change where the steps are too few to learn from."""
    say("tokens", f"{counts['tokens']:,}, of which {counts['trained_tokens'] / counts['tokens']:.0%} trained; "
        f"{counts['held_out']:,} conversations held out")  # fmt: skip
    bins = np.histogram(lengths, bins=8, range=(0, args.max_length))
    for count, low, high in zip(bins[0], bins[1], bins[1][1:], strict=False):
        print(f"  {low:>7.0f} to {high:<7.0f}{count:>7,}  {'█' * round(40 * count / max(bins[0]))}")
    say("rows", f"{counts['rows']:,} of at most {args.max_length:,} tokens, {counts['fill']:.1%} full")
    steps = counts["steps"]
    say("steps", f"{steps:,} optimizer steps ({args.epochs:g} epochs, {counts['rows_per_step']} rows each)")
    if steps < 30:
        rows = counts["rows"] * args.epochs / args.train_batch_size / args.processes
        accum = max(1, min(args.grad_accum, int(rows // 30)))
        epochs = args.epochs * max(1, -(-30 * accum // max(1, int(rows))))
        say(
            "warning",
            f"few steps: --grad-accum {accum} --epochs {epochs:g} would make {int(rows * epochs / args.epochs // accum)}",
        )


def preview(rows: Rows, count: int, decode):
    """Print rows with trained tokens in colour, or between ⟦ ⟧ where colour is not wanted."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[30;42m", "\033[0m") if colour else ("⟦", "⟧")
    for number in range(min(count, len(rows))):
        row = rows[number]
        print(f"=== row {number + 1}: {sum(map(len, row['input_ids'])):,} tokens")
        for ids, labels, file, line in zip(*(row[key] for key in ("input_ids", "labels", "file", "line")), strict=True):
            print(f"--- {file}:{line}: {len(ids):,} tokens, {(labels != IGNORE).sum():,} trained")
            edges = [0, *(np.flatnonzero(np.diff(labels != IGNORE)) + 1), len(ids)]
            for begin, end in pairwise(edges):
                text = visible(decode(ids[begin:end].tolist()), keep="\n\t\u00a0\u202f")
                print(f"{on}{text}{off}" if labels[begin] != IGNORE else text, end="")
            print()


def memory_plan(config: dict, args, tokens: int, trained_share: float, free_layers=0) -> dict[str, float]:
    """GiB that one step needs on a GPU, from the config alone; `free_layers` are not checkpointed.

    h hidden, f intermediate, kv key-value width, T tokens of a batch. The counts of what a layer
    keeps for backward are those of transformers' Llama with our attention and LoRA forward.
    """
    h, f, layers, vocabulary = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads", heads) * (config.get("head_dim") or h // heads)
    shapes = {"q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h),
              "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}  # fmt: skip
    projections = layers * sum(i * o for i, o in shapes.values())
    lora = layers * args.lora_r * sum(sum(shapes[name]) for name in args.lora_target_modules if name in shapes)
    size = 2 if args.bf16 else 4
    dropout = 12 * h + f if args.lora_dropout else 0  # a dropped copy and a mask for each adapter
    kept = (8 * f + 10 * h + 4 * kv + dropout) * size // 2 + 8 * h  # norms keep float32
    here = 1 / args.processes + 2 / layers if args.shard_base else 1  # a share, and two layers gathered
    parts = {
        "base weights": projections * (0.5 * here + (1 + 4 / 256) / 64) if args.bnb_nf4 else projections * size * here,
        "embedding and head": vocabulary * h * size * (1 if config.get("tie_word_embeddings") else 2),
        "LoRA, float32": lora * 4,
        "its gradients": lora * 4,
        "optimizer state": lora * optimizer_bytes(args),
        "activations": tokens * ((layers - free_layers) * h * size + max(free_layers, 1) * kept),
        "backward": tokens * f * 4 * size + 2 * h * f * size,
        "loss": min(trained_share * tokens, chunk_rows(vocabulary)) * vocabulary * (12 + 2 * size),
        "CUDA context": 0.7 * 2**30,
    }
    return {name: amount / 2**30 for name, amount in parts.items()}


def free_of(mode, layers: int, auto: int) -> int:
    """Layers that keep their activations under this --gradient-checkpointing."""
    return max(0, layers - mode) if isinstance(mode, int) else {"all": 0, "none": layers, "auto": auto}[mode]


def plan_of(config: dict, args, share: float) -> tuple[dict[str, float], int]:
    """(memory plan of these flags, layers that keep their activations)."""
    free = free_of(args.gradient_checkpointing, config["num_hidden_layers"], auto=0)
    return memory_plan(config, args, args.max_length * args.train_batch_size, share, free), free


def what_fits(config: dict, args, share: float, limit: float) -> str:
    """The flags that bring the plan below `limit` GiB, those that cost least first."""
    tried, flags = argparse.Namespace(**vars(args)), []
    changes = [("train_batch_size", 1), ("gradient_checkpointing", "all"), ("bnb_nf4", True), ("bf16", True)]
    changes += [("max_length", length) for length in (2**k for k in range(16, 8, -1)) if length < args.max_length]
    for name, value in changes:
        now = getattr(tried, name)
        if now == value or (name == "gradient_checkpointing" and now == "auto"):
            continue
        setattr(tried, name, value)
        flags = [flag for flag in flags if not flag.startswith("--max-length")]
        flags.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
        if sum(plan_of(config, tried, share)[0].values()) <= limit:
            return f"{' '.join(flags)} would"
    return "no flag makes it fit; take a smaller model or a larger card"


def print_memory_plan(config: dict, args, counts: dict, capacity: float, card: str):
    """The plan as a table for this card (GiB), and what to change where it does not fit."""
    share, layers = counts["trained_tokens"] / counts["tokens"], config["num_hidden_layers"]
    plan, free = plan_of(config, args, share)
    say(
        "memory",
        f"GiB for rows of {args.max_length:,} x {args.train_batch_size}, {layers - free} of {layers} layers checkpointed",
    )
    for name, amount in plan.items():
        print(f"  {name:<20} {amount:6.2f}")
    need, limit = sum(plan.values()), capacity * args.torch_memory_fraction
    verdict = "fits" if need <= limit else f"does not fit: {what_fits(config, args, share, limit)}"
    say("memory", f"{need:.1f} of {limit:.1f} GiB ({args.torch_memory_fraction:.0%} of {card}): {verdict}")
    return {**plan, "total": need, "limit": limit}


# ---- Model ---------------------------------------------------------------------------------------


def resolve_model(name: str) -> tuple[str, str | None]:
    """(local folder, Hub revision or None) of a folder or Hub name; downloads what is missing."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise InputError(f"--model {name}: no config.json in this folder; give a model in Hugging Face's layout")
        return name, None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"--model {name}: no such folder; give a local folder or a Hub name such as org/model")
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"], ignore_patterns="original/*"
        )
    except errors.GatedRepoError:
        raise InputError(
            f"--model {name}: access is gated; accept the licence at hf.co/{name}, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"--model {name}: unknown on the Hub; check the name, or `hf auth login` if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError):
        raise InputError(
            f"--model {name}: not in the local cache and no way to the Hub; go online or give a local folder"
        ) from None
    return folder, os.path.basename(folder)


def cached_model(name: str) -> str | None:
    """The folder of a Hub model in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "tokenizer_config.json", "tokenizer.json") if name.count("/") == 1 else ()
    found = [try_to_load_from_cache(name, file) for file in files]
    return os.path.dirname(found[0]) if found and all(isinstance(file, str) for file in found) else None


def local_vocabulary(args, folder: str) -> tuple[Vocabulary, ChatFormat]:
    """The tokenizer of a local folder without transformers, and the chat format with its end token."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        eos = json.loads((Path(folder) / "tokenizer_config.json").read_text())["eos_token"]
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(
            f"--model {folder}: no tokenizer that loads ({first_line(error)}); complete the folder"
        ) from None
    tokenizer = Vocabulary(backend, eos if isinstance(eos, str) else eos["content"])
    return tokenizer, chat_format(args.chat_format, tokenizer)


def load_config(name: str, folder: str):
    """The model's config, refused where it is no base that can be trained and merged."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"--model {name}: {first_line(error)}; give a causal language model") from None
    if getattr(config, "quantization_config", None):
        raise InputError(f"--model {name}: already quantised; give the 16-bit original, --bnb-nf4 quantises it")
    if not weight_files(folder):
        raise InputError(f"--model {name}: no *.safetensors in it; give a folder with the weights")
    return config


def weight_files(folder: str) -> list[str]:
    """The safetensors files of a local model folder."""
    return glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))


def check_weights(name: str, folder: str):
    """Read the headers of the weights: a file that was cut off shows before anything is thrown away."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder):
        try:
            safe_open(file, framework="pt").keys()
        except SafetensorError as error:
            what = f"{os.path.basename(file)}: {first_line(error)}"
            raise InputError(f"--model {name}: {what}; copy or download it again") from None


def load_tokenizer(name: str, folder: str):
    """transformers' fast tokenizer of the base; InputError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            f"--model {name}: no tokenizer that loads ({first_line(error)}); complete the folder"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(f"--model {name}: only a slow tokenizer; give a model with a tokenizer.json")
    return tokenizer


def first_line(error: Exception) -> str:
    """A library's error in one line."""
    return str(error).strip().split("\n")[0].rstrip(".")


def skeleton(name: str, config):
    """The model without weights, on the meta device: names and shapes cost nothing there."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        raise InputError(f"--model {name}: {first_line(error)}; give a causal language model") from None


def check_targets(model, targets: list[str]):
    """Each --lora-target-modules name must be a linear layer of the body; the head stays frozen."""
    import torch

    head = model.get_output_embeddings()
    linear = sorted(
        {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    )
    for name in targets or [""]:
        if name not in linear:
            raise InputError(
                f"--lora-target-modules {name}: matches no linear layer of the model; {nearest(name, linear)}"
            )


def load_base(args, folder: str, device):
    """The frozen base model: NF4 with double quantisation or plain, everything else in --bf16's dtype.

    prepare_model_for_kbit_training would cast norms, embeddings and head to float32 and with them
    the residual stream: a third slower and 3 GiB more, for nothing.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.bnb_dtype),  # the default would be float32
        bnb_4bit_quant_storage=torch.bfloat16 if args.shard_base else torch.uint8,  # FSDP shards floats only
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if args.bf16 else torch.float32,
        quantization_config=nf4 if args.bnb_nf4 else None,
        device_map={"": "cpu" if args.shard_base else device},
        attn_implementation=packed_attention(),
    )
    model.requires_grad_(False)
    for module in model.modules():
        # On CPUs with avx512_bf16 a no-grad forward repacks the 4-bit weights, and every gradient
        # after it is wrong while the loss looks right.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def add_lora(model, args, revision: str | None):
    """A PeftModel whose adapters are float32 and compute in the activations' dtype."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model.name_or_path = args.model if revision else os.path.abspath(args.model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        revision=revision,
    )
    model = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = lean_lora_forward.__get__(module)
    return model


def shard_base(model, device):
    """Each process keeps its share of the frozen layers and gathers a layer when its turn comes (FSDP).

    What is trained stays whole in every process, so optimizer, checkpoints and resuming are those of
    an unsharded run. Embedding, head, last norm and NF4's scales stay whole too.
    """
    from accelerate import PartialState
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    PartialState(cpu=device.type == "cpu")  # meets the other processes
    decoder = model.get_base_model().get_decoder()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in decoder.layers:
        for module in layer.modules():
            if hasattr(module, "quant_state"):
                module.quant_state.to(device)
        fully_shard(layer, ignored_params=trained)
    layers = set(decoder.layers.parameters())
    whole = trained | {p for p in model.parameters() if p not in layers}
    fully_shard(decoder, ignored_params=whole)  # the root: without weights of its own
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mine, whole_base = sum(p.to_local().nbytes for p in layers - trained), sum(p.nbytes for p in layers - trained)
    say("memory", f"each process holds {mine / 1e6:,.1f} of the {whole_base / 1e6:,.1f} MB of the base's layers")
    model.get_base_model().hf_device_map = {"": device}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


# ---- Speed ---------------------------------------------------------------------------------------


def lean_lora_forward(self, x):
    """A LoRA layer's forward: W x + s B A dropout(x), with A and B cast to x's dtype.

    PEFT casts x up to the adapters' float32 instead, which doubles what is kept for backward and
    multiplies in float32; autocast would avoid that at the price of a cast before every matmul.
    """
    import torch.nn.functional as F

    result = self.base_layer(x)
    if self.disable_adapters:
        return result
    (name,) = self.active_adapters
    a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
    return result.add(F.linear(F.linear(self.lora_dropout[name](x), a), b), alpha=self.scaling[name])


def packed_attention() -> str:
    """Register an attention that stays inside documents and needs no mask; return its name.

    On CUDA torch's varlen_attn (>= 2.10) skips the other documents' work; elsewhere sdpa runs once
    a document. The usual way builds a boolean S x S mask for each row and does all S x S work.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    try:
        from torch.nn.attention.varlen import varlen_attn

        grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not yet in torch 2.11
    except ImportError:
        varlen_attn, grouped = None, False

    def attention(
        module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs
    ):
        """query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d]"""
        if cu_seq_lens_q is None:  # generation: one sequence, no padding
            kwargs = {"dropout": 0.0, "scaling": scaling, "is_causal": kwargs.get("is_causal")}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        varlen = query.is_cuda and varlen_attn and query.dtype in (torch.bfloat16, torch.float16)
        if not (varlen and grouped):
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        if varlen:
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            ends, longest = (cu_seq_lens_q,) * 2, (max_length_q,) * 2
            more = {"enable_gqa": True} if grouped else {}
            return varlen_attn(q, k, v, *ends, *longest, scale=scaling, window_size=(-1, 0), **more)[None], None
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if torch.compiler.is_compiling():  # one graph for all lengths: the documents as a mask
            place = torch.arange(query.shape[2], device=query.device)
            document = torch.searchsorted(cu_seq_lens_q, place, right=True, out_int32=True)
            mask = (document[:, None] == document) & (place[:, None] >= place)
            return sdpa(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2), None
        ends = cu_seq_lens_q.tolist()
        spans = [slice(*span) for span in pairwise(ends)]
        out = [sdpa(query[:, :, s], key[:, :, s], value[:, :, s], is_causal=True, scale=scaling) for s in spans]
        return torch.cat(out, 2).transpose(1, 2), None

    # Without an AttentionMaskInterface of this name transformers builds no mask, and asks the GPU for none either.
    AttentionInterface.register("packed", attention)
    return "packed"


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits at once: about 2^25 numbers, 0.5 GiB with all that the loss makes of them."""
    return max(1, 2**25 // vocabulary)


def chunked_cross_entropy(hidden, head, targets, rows):
    """Sum of the cross-entropies of head(hidden) and targets: [N, h], [N] -> scalar, float32.

    The head is frozen, so the gradient of `hidden` is all that backward needs: it is computed
    chunk by chunk along with the loss, and no more than `rows` x vocabulary logits ever exist.
    The idea is Liger Kernel's fused linear cross-entropy (arXiv 2410.10989), without a kernel.
    """
    import torch
    import torch.nn.functional as F

    class SumOfLosses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            total, grads = hidden.new_zeros((), dtype=torch.float32), []
            for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
                with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                    chunk = chunk.detach().requires_grad_(ctx.needs_input_grad[0])
                    loss = F.cross_entropy(head(chunk).float(), target, reduction="sum")
                total += loss.detach()
                if ctx.needs_input_grad[0]:
                    grads += torch.autograd.grad(loss, chunk)
            if grads:
                ctx.save_for_backward(torch.cat(grads))
            return total

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    return SumOfLosses.apply(hidden)


def lose_on_trained_tokens(model):
    """Make the causal LM's forward, given shift_labels, return the loss of those places alone.

    Only the hidden states before a trained token go through the head. The loss is their mean, or
    their sum over num_items_in_batch, as transformers has it. Without shift_labels (generation)
    the forward is the model's own.
    """
    from transformers.modeling_outputs import CausalLMOutput

    whole_forward, decoder, head = model.forward, model.get_decoder(), model.get_output_embeddings()

    def forward(*args, shift_labels=None, labels=None, logits_to_keep=0, num_items_in_batch=None, **kwargs):
        if shift_labels is None:
            return whole_forward(*args, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        hidden = decoder(*args, use_cache=False, **kwargs).last_hidden_state[0].index_select(0, logits_to_keep)
        total = chunked_cross_entropy(hidden, head, shift_labels[0], chunk_rows(model.config.vocab_size))
        return CausalLMOutput(loss=total / (shift_labels.numel() if num_items_in_batch is None else num_items_in_batch))

    model.forward = forward


def check_head(model, vocabulary: int):
    """Refuse a model whose logits are more than its head's (a softcap, a scale): our loss would be wrong."""
    import torch

    ids = torch.arange(8, device=model.device)[None] % vocabulary
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
        ours = model.get_output_embeddings()(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(theirs.float(), ours.float(), rtol=1e-2, atol=1e-2):
        raise InputError("--model: its logits are more than a linear head's; this program trains Llama-like models")


def checkpoint_layers(layers, free: int):
    """Recompute all layers but the last `free`: those are the first that backward lets go."""
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < len(layers) - free


def free_layers(layers, peak, limit: float, probe=2) -> int:
    """How many layers may keep their activations below `limit` bytes; peak() does one step, returns bytes."""
    checkpoint_layers(layers, 0)
    least = peak()
    checkpoint_layers(layers, probe)
    try:
        each = max(1.0, (peak() - least) / probe)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return 0
    return max(0, min(len(layers), int((limit - least) // each)))


def compile_layers(base, **options):
    """torch.compile each layer: one graph for all, since the first one's input needs a gradient too, and for all lengths."""
    base.enable_input_require_grads()
    for layer in base.get_decoder().layers:
        layer.compile(fullgraph=True, dynamic=True, **options)


def plan_checkpointing(model, rows: Rows, args):
    """Checkpoint only the layers that must be: each other one saves a thirtieth of a third of the time."""
    import torch

    base = model.get_base_model()
    layers, mode = base.get_decoder().layers, args.gradient_checkpointing
    # transformers 5.17 knows it by its old name only.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if mode == "auto" and model.device.type == "cuda" and not args.shard_base:
        batch = collate([rows.longest()] * args.train_batch_size)

        def peak():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "documents"}
            model.train()(**inputs).loss.backward()
            return torch.cuda.max_memory_reserved()

        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = torch.cuda.get_device_properties(model.device).total_memory
        limit = 0.95 * args.torch_memory_fraction * total - trained * optimizer_bytes(args)
        free = free_layers(layers, peak, limit)
        model.zero_grad()
        torch.cuda.empty_cache()
    else:
        free = free_of(mode, len(layers), auto=0 if args.shard_base else len(layers))
    checkpoint_layers(layers, free)
    say(
        "memory",
        f"{len(layers) - free} of {len(layers)} layers recompute their activations (--gradient-checkpointing {mode})",
    )
    if args.compile:
        compile_layers(base)


# ---- Training ------------------------------------------------------------------------------------


def set_allocator(args):
    """Set CUDA's allocator; torch reads the variable when it is imported, so this comes before."""
    set_already = next((v for v in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if v in os.environ), None)
    if set_already:
        say("allocator", f"{set_already}={os.environ[set_already]} from the environment is kept")
    elif args.cuda_alloc_expandable:
        # Together the two block the reuse of freed segments: 220 MiB reserved become 14,060 (pytorch #193400).
        say(
            "allocator",
            f"expandable_segments, without --max-split-size-mb {args.max_split_size_mb}: the pair wastes memory",
        )
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    else:
        os.environ["PYTORCH_ALLOC_CONF"] = f"max_split_size_mb:{args.max_split_size_mb}"


def choose_device(args):
    """The device, its memory capped; on a CPU the knobs that change nothing there are named once."""
    import torch

    if not torch.cuda.is_available():
        say("device", "CPU: --torch-memory-fraction and the allocator's settings need CUDA and change nothing here")
        if args.bf16 and not torch.cpu._is_avx512_bf16_supported():
            say("device", "this CPU has no bfloat16: --no-bf16 --bnb-dtype float32 is about ten times faster")
        if args.optim.startswith("paged_"):
            args.optim = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}[args.optim]
            say("device", f"paged optimizer state needs CUDA: {args.optim} does the same arithmetic unpaged")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.cuda.set_per_process_memory_fraction(args.torch_memory_fraction, device)
    if (args.bf16 or (args.bnb_nf4 and args.bnb_dtype == "bfloat16")) and not torch.cuda.is_bf16_supported(False):
        raise InputError("--bf16: this GPU has no bfloat16; use --no-bf16 --bnb-dtype float16")
    card = torch.cuda.get_device_properties(device)
    memory = f"{card.total_memory / 2**30:.1f} GiB, of which {args.torch_memory_fraction:.0%} may be used"
    say("device", f"{card.name}, {memory}")
    return device


def claim_output(args):
    """Make the output folder ours: refuse a used one unless asked, and a running one always."""
    import fcntl

    folder = args.output
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; name a folder")
    ours = (folder / ".lock").exists() or (folder / RECORD).exists()
    used = folder.exists() and any(entry.name != ".lock" for entry in folder.iterdir())
    if args.resume and not (folder / RECORD).is_file():
        raise InputError(f"--resume: no run in {folder}; start it without --resume")
    if used and not (args.resume or args.overwrite):
        raise InputError(
            f"--output {folder}: already in use; --resume goes on, --overwrite starts anew, or name another"
        )
    if used and args.overwrite and not ours:
        raise InputError(f"--output {folder}: holds what no training has written; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - held until the process ends, whatever ends it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--output {folder}: another process is training there; wait for it or name another") from None
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}; name a folder that can be written") from None
    return lock


def clear_output(folder: Path):
    """--overwrite: when nothing stands in the new run's way any more, the old one goes."""
    for entry in folder.iterdir():
        if entry.name != ".lock":
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


class Stop:
    """SIGINT and SIGTERM: leave at once before training; in it, end the step and keep a checkpoint."""

    def __init__(self, processes=1):
        self.signal, self.agreed, self.gently, self.processes = None, None, False, processes
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self)

    def __call__(self, signum, frame):
        if self.signal:
            os._exit(128 + signum)
        if not self.gently:
            sys.exit(128 + signum)
        self.signal = signum
        print("\nstopping after this step and its checkpoint; once more leaves at once", flush=True)

    def everywhere(self, accelerator) -> bool:
        """Whether a signal has come to any process: all of them must leave at the same step."""
        import torch

        self.agreed = self.signal
        if self.processes > 1:
            signals = accelerator.gather(torch.tensor([self.signal or 0], device=accelerator.device))
            self.agreed = int(signals.max()) or None
        return self.agreed is not None


def out_of_memory(error: Exception) -> bool:
    """Of the GPU, or of main memory, for which torch has no class of its own."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def roomier(args) -> str:
    """The change that saves most memory, of those not made yet."""
    if not args.bnb_nf4:
        return "--bnb-nf4 needs less"
    if args.train_batch_size > 1:
        return f"--train-batch-size 1 --grad-accum {args.grad_accum * args.train_batch_size} needs less"
    if args.gradient_checkpointing not in ("auto", "all"):
        return "--gradient-checkpointing all needs less"
    return f"--max-length {args.max_length // 2} needs less"


def train_within_memory(trainer, checkpoint: str | None, args):
    """trainer.train; out of memory, begin again from the last checkpoint with half as many free layers.

    The program replaces itself by a new one: nothing that a failed step has allocated stays behind.
    """
    layers = trainer.model.get_base_model().get_decoder().layers
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        checkpointed = sum(layer.gradient_checkpointing for layer in layers)
        if not out_of_memory(error) or checkpointed == len(layers) or args.processes > 1:
            raise
    more = checkpointed + -(-(len(layers) - checkpointed) // 2)
    more = "all" if more == len(layers) else str(more)
    say("memory", f"not enough with {checkpointed} layers checkpointed; going on with {more}")
    options = [option for option in sys.argv if option not in ("--resume", "--overwrite")]
    os.execv(sys.executable, [sys.executable, *options, "--resume", "--gradient-checkpointing", more])


def training_arguments(args, evaluating: bool):
    """Our knobs in transformers' words."""
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.train_batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.grad_accum,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_ratio,  # below 1 it is a share
        max_grad_norm=args.max_grad_norm,
        optim=args.optim,
        seed=args.seed,
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,  # it waits for the GPU after every batch; we look once a step
        eval_strategy="steps" if evaluating else "no",
        eval_steps=args.eval_steps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        load_best_model_at_end=evaluating,
        metric_for_best_model="eval_loss" if evaluating else None,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=args.report_to,
        restore_callback_states_from_checkpoint=True,  # --early-stopping goes on counting
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )


def make_trainer(args, model, tokenizer, train_rows, eval_rows, prompts: list[str], stop: Stop):
    """A Hugging Face Trainer with exact evaluation, whole checkpoints and a word for what went wrong."""
    import torch
    import transformers
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

    class Trainer(transformers.Trainer):
        tokens, documents = 0, ()  # seen so far; those of the running step

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.tokens += inputs["input_ids"].numel()
            self.documents = (*self.documents, *inputs.pop("documents"))
            return super().training_step(model, inputs, num_items_in_batch)

        def _get_grad_norm(self, model, grad_norm=None):
            grad_norm = super()._get_grad_norm(model, grad_norm)
            if not torch.isfinite(torch.as_tensor(grad_norm)):
                raise InputError(
                    f"step {self.state.global_step + 1}: the gradient is {float(grad_norm)}; look at "
                    f"{', '.join(self.documents[:8])}{' …' if len(self.documents) > 8 else ''}, or lower --learning-rate"
                )
            self.documents = ()
            return grad_norm

        def floating_point_ops(self, inputs):
            return 0  # 6 x parameters x tokens, walked through at each batch, is wrong for LoRA anyway

        def get_eval_dataloader(self, eval_dataset=None):
            """Every process gets as many rows, for they may meet in each layer; what fills up counts nothing."""
            rows, count = self.eval_dataset, len(self.eval_dataset)
            mine = range(args.process, -(-count // args.processes) * args.processes, args.processes)

            def fetch(numbers):
                return collate([rows[i] if i < count else {**rows[0], "labels": [np.full(1, IGNORE)]} for i in numbers])

            return torch.utils.data.DataLoader(mine, args.eval_batch_size, collate_fn=fetch)

        def evaluation_loop(self, dataloader, description, *_, metric_key_prefix="eval", **__):
            """Mean loss of all trained tokens; Trainer's own is a mean of batch means."""
            self.model.eval()
            total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, tokens
            for inputs in dataloader:
                del inputs["documents"]
                with torch.no_grad():
                    loss = self.model(**self._prepare_inputs(inputs), num_items_in_batch=1).loss  # their sum
                total += torch.stack([loss.double(), torch.tensor(inputs["labels"].numel(), device=loss.device)])
            loss, count = self.accelerator.reduce(total, "sum").tolist()
            if prompts and self.is_in_train:
                said = answers(self.model, tokenizer, prompts)
                if not args.process:
                    write_samples(args.output / "samples.md", self.state.global_step, said)
            return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss / count}, len(self.eval_dataset))

        def _determine_best_metric(self, metrics, trial):
            """Each new best is saved at once, whatever --save-steps: Trainer would remember it and keep another."""
            best = super()._determine_best_metric(metrics, trial)
            self.control.should_save |= best
            return best

        def _save_checkpoint(self, model, trial):
            """Trainer's checkpoint, and last of all the list of its files: without it, it is none."""
            folder = args.output / f"checkpoint-{self.state.global_step}"
            self.args.save_total_limit = None  # nothing older goes before the new one is complete
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process adds its random state
                if self.args.should_save:
                    files = {file.name: sha256(str(file)) for file in sorted(folder.iterdir()) if file.name != COMPLETE}
                    write_json(folder / COMPLETE, files)
            except Exception:  # torch, safetensors and tokenizers each raise their own where the disk is full
                if shutil.disk_usage(args.output).free > 2**20:
                    raise
                shutil.rmtree(folder)
                raise InputError(f"{folder}: No space left on the disk; make room, then go on with --resume") from None
            if self.args.should_save:
                rotate_checkpoints(str(args.output), args.save_total_limit, self.state.best_model_checkpoint)

    arguments = training_arguments(args, evaluating=eval_rows is not None)  # the processes meet here
    if not args.output.is_dir():
        raise InputError(f"--output {args.output}: not on this machine; name a folder that all machines share")
    check_disk(args, sum(p.numel() for p in model.parameters() if p.requires_grad))
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress_callback(trainer, stop))
    if args.early_stopping and eval_rows:
        trainer.add_callback(transformers.EarlyStoppingCallback(args.early_stopping))
    return trainer


def progress_callback(trainer, stop: Stop):
    """One line a logging step, a bar where there is a terminal, and the end of the step on a signal."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", disable=no_bar(), leave=False
            )
            self.began, self.first, self.tokens = time.monotonic(), state.global_step, trainer.tokens

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update()
            if stop.everywhere(trainer.accelerator):
                control.should_save = control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not state.is_world_process_zero or not hasattr(self, "bar"):
                return
            step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            if "loss" in logs:
                spent, done = time.monotonic() - self.began, state.global_step - self.first
                left = spent / max(done, 1) * (state.max_steps - state.global_step)
                self.bar.write(
                    f"{step}  loss {logs['loss']:.4f}  grad {logs['grad_norm']:.3f}  lr {logs['learning_rate']:.1e}  "
                    f"{(trainer.tokens - self.tokens) * args.world_size / spent:,.0f} tok/s  left {duration(left)}",
                    file=sys.stdout,
                )
            elif "eval_loss" in logs:
                self.bar.write(f"{step}  held-out loss {logs['eval_loss']:.4f}", file=sys.stdout)
            sys.stdout.flush()  # into a file too, line by line

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Progress()


def duration(seconds: float) -> str:
    """As 1h05 or 4m09: with five-digit steps and speeds a line still has 80 columns."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}" if minutes >= 60 else f"{minutes}m{seconds:02}"


# ---- Checkpoints and the run's record ------------------------------------------------------------

RECORD = "training_args.json"  # the run's record, and the contract with merge_lora.py
COMPLETE = "complete.json"  # written last into a checkpoint: its files and their sha256


def write_samples(file: Path, step: int, answers: dict[str, str]):
    """Add the answers of one evaluation to samples.md."""
    with open(file, "a", encoding="utf-8") as samples:
        for prompt, text in answers.items():
            samples.write(f"## Step {step}: {prompt}\n\n{text}\n\n")


def write_json(file: Path, content):
    """Write in one go: the file appears whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(partial, file)


def optimizer_bytes(args) -> int:
    """Bytes of optimizer state for each trained parameter: two moments, in 8 or 32 bits."""
    return 2 if "8bit" in args.optim else 8


def check_disk(args, trained: int):
    """Refuse a run whose checkpoints will not fit: adapters, optimizer state and 20 MB of tokenizer each."""
    need = (args.save_total_limit + 1) * (trained * (4 + optimizer_bytes(args)) + 20 * 2**20)
    free = shutil.disk_usage(args.output).free
    if free < need:
        raise InputError(
            f"--output {args.output}: {free / 1e9:.2f} GB free, the checkpoints may need {need / 1e9:.2f} GB; "
            "make room or lower --save-total-limit"
        )


def newest_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that is whole; those that are not are named and removed."""
    found = sorted(output.glob("checkpoint-*"), key=lambda folder: -int(folder.name.split("-")[1]))
    for folder in found:
        try:
            files = json.loads((folder / COMPLETE).read_text())
            damaged = next((name for name, digest in files.items() if sha256(str(folder / name)) != digest), None)
        except (OSError, ValueError) as error:
            damaged = getattr(error, "filename", None) or COMPLETE
        if not damaged:
            return str(folder)
        say("resume", f"{folder} is damaged ({os.path.basename(damaged)}): removed, the one before is taken")
        shutil.rmtree(folder)
    return None


# What may differ when a run is resumed; batches, accumulation and processes may as long as their product does not.
MAY_DIFFER = {"output", "resume", "force_resume", "overwrite", "dry_run", "preview", "json", "report_to", "sample_prompts",
              "train_batch_size", "grad_accum", "eval_batch_size", "logging_steps", "save_steps", "save_total_limit",
              "gradient_checkpointing", "shard_base", "torch_memory_fraction", "cuda_alloc_expandable", "max_split_size_mb"}  # fmt: skip


def run_record(args, chat: ChatFormat, revision, files: dict[str, str], counts: dict) -> dict:
    """What training_args.json says: enough to merge the adapter, and to do the run again."""
    from importlib.metadata import version

    knobs = {name: value for name, value in vars(args).items() if name not in ("process", "processes")}
    libraries = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors", "tokenizers")
    return {
        "chat_format": {"name": args.chat_format, **chat._asdict()},
        "base": {"model": args.model if revision else os.path.abspath(args.model), "revision": revision},
        "quantization": {"bnb_nf4": args.bnb_nf4, "bnb_dtype": args.bnb_dtype, "bnb_double_quant": args.bnb_nf4},
        "args": knobs,
        "data": {"sha256": files, **counts},
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in libraries}},
    }


def check_same_run(old: dict, new: dict):
    """Refuse to resume what is another run: name the fields that differ."""
    flat = lambda record: {  # noqa: E731
        **{f"data {file}": digest for file, digest in record["data"]["sha256"].items()},
        **{f"base {key}": value for key, value in record["base"].items()},
        "rows in a step (--train-batch-size x --grad-accum x processes)": record["data"]["rows_per_step"],
        **{f"--{k.replace('_', '-')}": v for k, v in record["args"].items() if k not in MAY_DIFFER},
    }
    old, new = flat(old), flat(json.loads(json.dumps(new, default=str)))
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if different:
        raise InputError(
            f"--resume: not the same run, these differ: {', '.join(different)}; "
            "restore them, add --force-resume, or begin anew with --overwrite"
        )


# ---- Report --------------------------------------------------------------------------------------

PROMPTS = (
    "Qui es-tu ?",
    "Comment distinguer ce que je sais de ce que je crois ?",
    "Je n'arrive pas à dormir. À quoi bon insister ?",
)


def sample_prompts(file: Path | None) -> list[str]:
    """The questions answered before training and at each evaluation."""
    if file is None or str(file) == "none":
        return [] if file else list(PROMPTS)
    try:
        return [line.strip() for _, line in numbered_lines(str(file)) if line.strip()]
    except OSError as error:
        what = error.strerror.lower()
        raise InputError(f"--sample-prompts {file}: {what}; write one question a line, or give none") from None


def answers(model, tokenizer, prompts: list[str], max_new_tokens=80) -> dict[str, str]:
    """Greedy answers by their questions, one at a time: no padding, so the packed attention serves here too."""
    import torch
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=[
            tokenizer.eos_token_id,
            *(ends if isinstance(ends, list) else [ends] if ends is not None else []),
        ],
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.eval()
    together = torch.distributed.is_initialized()  # processes that share a base must go on until all have ended
    texts = {}
    for prompt in prompts:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(chat, return_tensors="pt").input_ids.to(model.device)  # adds BOS where the model has one
        output = model.generate(ids, generation_config=greedy, synced_gpus=together)
        texts[prompt] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return texts


def plot_losses(history: list[dict], tokens_per_step: float, before: float | None, file: Path):
    """Training and held-out loss against tokens seen, the learning rate under them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = [log for log in history if "loss" in log]
    held_out = [(log["step"], log["eval_loss"]) for log in history if "eval_loss" in log]
    held_out = ([(0, before)] if before is not None else []) + held_out
    figure, (loss, rate) = pyplot.subplots(2, sharex=True, height_ratios=(3, 1), figsize=(7, 4.5), layout="constrained")
    loss.plot([log["step"] * tokens_per_step for log in logs], [log["loss"] for log in logs], lw=1, label="training")
    if held_out:
        steps, values = zip(*held_out, strict=True)
        loss.plot([step * tokens_per_step for step in steps], values, marker="o", ms=4, label="held out")
    loss.set_ylabel("loss (nats per token)")
    loss.legend(frameon=False)
    loss.grid(alpha=0.3)
    rate.plot(
        [log["step"] * tokens_per_step for log in logs], [log["learning_rate"] for log in logs], lw=1, color="grey"
    )
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens seen")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def write_card(args, record: dict, file: Path):
    """The adapter's README.md: a model card with what was done, measured and said."""
    from huggingface_hub import ModelCardData

    base, data, results = record["base"], record["data"], record["results"]
    hub = {"base_model": base["model"]} if base["revision"] else {}
    card = ModelCardData(
        language="fr", library_name="peft", pipeline_tag="text-generation", tags=["lora", "sft", "dolores"], **hub
    )
    lines = ["---", card.to_yaml().strip(), "---", "# Dolores v5", ""]
    lines += [
        f"LoRA adapter for `{base['model']}`" + (f" at revision `{base['revision']}`" if base["revision"] else ""),
        "",
    ]
    lines += ["![Loss](loss.png)", "", "| | |", "|---|---|"]
    rows = {
        "conversations": f"{data['conversations']:,}, of which {data['held_out']:,} held out",
        "tokens an epoch": f"{data['tokens']:,}, {data['trained_tokens']:,} of them trained",
        "optimizer steps": f"{results['steps']:,}",
        "chat format": record["chat_format"]["name"],
    }
    if "eval_loss_before" in results:
        rows["held-out loss"] = f"{results['eval_loss_before']:.4f} → {results['eval_loss_after']:.4f}"
        rows["held-out perplexity"] = (
            f"{np.exp(results['eval_loss_before']):.2f} → {np.exp(results['eval_loss_after']):.2f}"
        )
        rows["adapter from"] = f"step {results['best_step']}, the best by held-out loss"
    rows |= {f"`{name}`": f"sha256 `{value[:16]}…`" for name, value in data["sha256"].items()}
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    before, after = results["samples"]["before"], results["samples"]["after"]
    if after:
        lines += ["", "## Before and after"]
    for prompt in after:  # a resumed run may ask what was not asked before
        lines += ["", f"**{prompt}**"]
        for when, text in (("before", before.get(prompt, "(not asked)")), ("after", after[prompt])):
            lines += ["", f"*{when}*", "", *(f"> {line}" for line in text.split("\n"))]
    knobs = " ".join(f"{name}={value}" for name, value in record["args"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += ["", "## Merge and run", "", "```bash", f"python3 merge_lora.py --adapter {args.output} --output dolores_v5_full",
              "ollama create dolores-v5 -f dolores_v5_full/Modelfile", "ollama run dolores-v5", "```", "",
              "## Reproduce", "", f"Knobs: {knobs}", "", f"Versions: {versions}", "",
              "The licence of the base model binds this adapter and what is merged from it."]  # fmt: skip
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- The whole story -----------------------------------------------------------------------------


def look(args):
    """--dry-run: what the data is, what a step needs, and what it will train on; no torch."""
    Stop()
    files, eval_files = expand(args.train_files), expand(args.eval_files)
    found = survey(files | eval_files, args.input_format)
    print_survey(found)
    folder = args.model if os.path.isdir(args.model) else cached_model(args.model)
    if folder:
        encode = Encoder(*local_vocabulary(args, folder))
        train_rows, _, counts, lengths, warnings = make_rows(files, eval_files, args, encode)
        print_tokens(counts, lengths, args)
        print_warnings(warnings)
        config = json.loads((Path(folder) / "config.json").read_text())
        plan = print_memory_plan(config, args, counts, capacity=24, card="a 24 GiB card")
        found |= counts | {"memory_gib": plan, "warnings": found["warnings"] + warnings}
        preview(train_rows, args.preview, lambda ids: encode.tokenizer.decode(ids, skip_special_tokens=False))
    else:
        say("tokens", f"{args.model} is not on this machine yet; its tokenizer would tell tokens, rows and steps")
    if args.json:
        write_json(
            args.json,
            {
                **found,
                "warnings": [dict(zip(("file", "line", "kind", "text"), w, strict=True)) for w in found["warnings"]],
            },
        )


def train(args):
    """The documented run: look, load, train, keep the best adapter, report."""
    stop = Stop(args.processes)
    files, eval_files = expand(args.train_files), expand(args.eval_files)
    prompts = sample_prompts(args.sample_prompts)
    found = survey(files | eval_files, args.input_format)  # errors in the data show now, before slow imports
    lock = None if args.process else claim_output(args)
    set_allocator(args)
    quiet()
    from accelerate.utils import broadcast_object_list
    from transformers import set_seed

    device = choose_device(args)
    folder, revision = resolve_model(args.model)
    config, tokenizer = load_config(args.model, folder), load_tokenizer(args.model, folder)
    check_targets(skeleton(args.model, config), args.lora_target_modules)
    chat = chat_format(args.chat_format, tokenizer)
    tokenizer.chat_template = chat_template(chat)

    print_survey(found)
    train_rows, eval_rows, counts, lengths, warnings = make_rows(files, eval_files, args, Encoder(tokenizer, chat))
    print_tokens(counts, lengths, args)
    print_warnings(warnings)
    if eval_rows and args.save_steps % args.eval_steps:
        raise InputError(
            f"--save-steps {args.save_steps}: must be a multiple of --eval-steps {args.eval_steps}; change one of them"
        )
    if device.type == "cuda":
        import torch

        card = torch.cuda.get_device_properties(device)
        print_memory_plan(config.to_dict(), args, counts, card.total_memory / 2**30, card.name)
    record = run_record(args, chat, revision, files | eval_files, counts)
    check_weights(args.model, folder)
    checkpoint = None
    if not args.process:
        checkpoint = resume_point(args, record) if args.resume else clear_output(args.output)

    set_seed(args.seed)
    model = load_base(args, folder, device)
    check_head(model, config.vocab_size)
    lose_on_trained_tokens(model)
    model = add_lora(model, args, revision)
    if args.shard_base:
        shard_base(model, device)
    plan_checkpointing(model, train_rows, args)
    trainer = make_trainer(args, model, tokenizer, train_rows, eval_rows, prompts, stop)
    checkpoint, results = broadcast_object_list([checkpoint, record.get("results") or {}])
    record["results"] = results
    if not results:
        if eval_rows:
            results["eval_loss_before"] = trainer.evaluate()["eval_loss"]
        results["samples"] = {"before": answers(model, tokenizer, prompts)}
        if not args.process:
            write_json(args.output / RECORD, record)

    stop.gently = True
    set_seed(args.seed)  # the same numbers whether or not an evaluation came before
    train_within_memory(trainer, checkpoint, args)
    if stop.agreed and trainer.state.global_step < trainer.state.max_steps:
        print(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; go on with:\n  {resume_command(args)}"
        )
        sys.exit(128 + stop.agreed)
    results["samples"]["after"] = answers(model, tokenizer, prompts)
    if not args.process:
        finish(args, record, trainer, config)
        lock.close()
    trainer.accelerator.end_training()


def make_rows(files, eval_files, args, encode: Encoder):
    """(train rows, eval rows or None, counts, lengths, warnings); stops where nothing would be trained."""
    samples, warnings = prepare(files, args, encode)
    digests, tokens, trained = measure(samples)
    if eval_files:
        eval_samples, more = prepare(eval_files, args, encode)
        eval_digests, eval_tokens, eval_trained = measure(eval_samples)
        held_out, warnings = np.isin(digests, eval_digests), warnings + more
        both = samples.select(np.flatnonzero(held_out)).select_columns(["file", "line"])
        places = dict.fromkeys(tuple(place.values()) for place in both)  # once, however many parts it has
        warnings += [(*place, "held out", "also in --eval-files: not trained on") for place in places]
    else:
        held_out = hold_out(digests, args.eval_fraction, args.seed)
        eval_samples, eval_digests, eval_tokens = samples, digests[held_out], tokens
    chosen = np.flatnonzero(~held_out)
    too_long = f"no answer fits into --max-length {args.max_length}"
    if not trained[chosen].sum():
        why = "all of it is in --eval-files" if len(digests) and held_out.all() else too_long
        raise InputError(f"{', '.join(files)}: nothing to train on; {why}")
    if eval_files and not eval_trained.sum():
        raise InputError(f"{', '.join(eval_files)}: nothing to evaluate; {too_long}")

    def rows(samples, chosen, lengths):
        plan = pack(lengths[chosen], args.max_length, args.seed) if args.packing else np.arange(len(chosen))[:, None]
        return Rows(samples, [chosen[row] for row in plan])

    train_rows = rows(samples, chosen, tokens)
    evaluated = np.arange(len(eval_tokens)) if eval_files else np.flatnonzero(held_out)
    eval_rows = rows(eval_samples, evaluated, eval_tokens) if len(evaluated) else None
    rows_per_step = args.train_batch_size * args.grad_accum * args.processes
    steps_per_epoch = -(-len(train_rows) // rows_per_step)
    counts = {
        "conversations": len(np.union1d(digests, eval_digests)),
        "held_out": len(np.unique(eval_digests)),
        "tokens": int(tokens[chosen].sum()),
        "trained_tokens": int(trained[chosen].sum()),
        "rows": len(train_rows),
        "fill": round(float(tokens[chosen].sum() / (len(train_rows) * args.max_length)), 4),
        "rows_per_step": rows_per_step,
        "steps_per_epoch": steps_per_epoch,
        "steps": int(np.ceil(args.epochs * steps_per_epoch)),
    }
    return train_rows, eval_rows, counts, tokens[chosen], warnings


def resume_point(args, record: dict) -> str | None:
    """The checkpoint to go on from; the record takes over what was measured before it."""
    previous = json.loads((args.output / RECORD).read_text())
    if not args.force_resume:
        check_same_run(previous, record)
    record["results"] = previous.get("results", {})
    checkpoint = newest_checkpoint(args.output)
    say("resume", f"from {checkpoint}" if checkpoint else "from the beginning: there is no whole checkpoint yet")
    return checkpoint


def finish(args, record: dict, trainer, config):
    """Write the adapter (the best by held-out loss), its record, card and picture; say what to type next."""
    state, results, data = trainer.state, record["results"], record["data"]
    trainer.save_model(str(args.output))
    config.save_pretrained(args.output)
    results["steps"] = state.global_step
    if state.best_metric is not None:
        results |= {"eval_loss_after": state.best_metric, "best_step": state.best_global_step}
    write_json(args.output / RECORD, record)
    tokens_per_step = data["tokens"] / data["steps_per_epoch"]
    plot_losses(state.log_history, tokens_per_step, results.get("eval_loss_before"), args.output / "loss.png")
    write_card(args, record, args.output / "README.md")
    say("adapter", f"{args.output}/adapter_model.safetensors; README.md and loss.png tell how it went")
    if "eval_loss_before" in results:
        before, after = results["eval_loss_before"], results["eval_loss_after"]
        say(
            "held out",
            f"loss {before:.4f} -> {after:.4f}, perplexity {np.exp(before):.2f} -> {np.exp(after):.2f} (step {results['best_step']})",
        )
    default = args.output == Path("runs_dolores_v5/llama31_clean")
    say("next", "python3 merge_lora.py" + ("" if default else f" --adapter {args.output} --output OUTPUT"))


def resume_command(args) -> str:
    """What to type after a stop: this command, and this launcher, with --resume."""
    import shlex

    names = {"--nproc-per-node": "LOCAL_WORLD_SIZE"}
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # several machines; this is the first
        names |= {"--nnodes": "GROUP_WORLD_SIZE", "--node-rank": "GROUP_RANK"}
        names |= {"--master-addr": "MASTER_ADDR", "--master-port": "MASTER_PORT"}
    flags = [word for flag, name in names.items() if name in os.environ for word in (flag, os.environ[name])]
    launcher = ["torchrun", *flags] if args.processes > 1 else ["python3"]
    return shlex.join([*launcher, *(arg for arg in sys.argv if arg not in ("--resume", "--overwrite")), "--resume"])


def quiet():
    """No library talks on a normal run; what matters we say ourselves."""
    import logging
    import warnings

    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT 0.21 asks
    if not sys.stderr.isatty():
        disable_progress_bar()


def main():
    """Look or train; each ending is one line and an exit status."""
    args = parse_args()
    args.process, args.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process speaks for all
    try:
        if args.shard_base and args.processes == 1:
            raise InputError("--shard-base: needs several processes; start them by torchrun, or leave it out")
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise InputError("accelerate's FSDP is on: it shards adapters too; turn it off and use --shard-base")
        (look if args.dry_run else train)(args)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
            print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"{error.filename or 'cache or output'}: no space left on the disk; make room", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        tried = re.search(r"ried to allocate [\d.]+ \w+", str(error))
        print(f"out of memory{f' (t{tried[0]})' if tried else ''}; {roomier(args)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
