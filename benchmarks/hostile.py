#!/usr/bin/env python3
"""Processor time of reading and encoding hostile data at n, 2n, 4n and 8n: it should double from column to column.

    python benchmarks/hostile.py            # n = 1.25 MB, so that the last column is a file of about 10 MB

Each cell: reading / encoding with SmolLM2's vocabulary / with Llama 3.1's, in seconds of processor time, of one run;
the last column is the growth of all three together from n to 8n (8 is linear).
"""

import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import parts  # noqa: E402

import train_sft_dolores as sft  # noqa: E402

A = "\n<|assistant|>\na\n"
DATA = {
    "one line of x": lambda n: "<|user|>\n" + "x" * n + A,
    "one line of words": lambda n: "<|user|>\n" + "le mot " * (n // 7) + A,
    "one line of blanks": lambda n: "<|user|>\n" + ("a" + " " * 99_999) * (n // 100_000) + "b" + A,
    "one line of digits": lambda n: "<|user|>\n" + "7" * n + A,
    "empty lines": lambda n: "<|user|>\na" + "\n" * n + "b" + A,
    "blank lines": lambda n: "<|user|>\na" + " \t\n" * (n // 3) + "b" + A,
    "backslashes": lambda n: "<|user|>\n" + "\\" * n + A,
    "tags in a line": lambda n: "<|user|>\n" + " <|eot_id|>" * (n // 11) + A,
    "escapes in a line": lambda n: "<|im_start|>user\n" + "\\<|im_end|>" * (n // 12) + "<|im_end|>" + A,
    "escaped lines": lambda n: "<|user|>\n" + "\\<|user|>\n" * (n // 10) + A,
    "tags begun": lambda n: "<|user|>\nq" + "<|" * (n // 2) + A,
    "emoji": lambda n: "<|user|>\n" + "🙂" * (n // 4) + A,
    "mojibake": lambda n: "<|user|>\n" + "Ã©" * (n // 4) + A,
    "one role's turns": lambda n: "<|user|>\nq\n" * (n // 11) + A,
    "exchanges": lambda n: "<|user|>\nq\n<|assistant|>\na\n" * (n // 28),
    "conversations": lambda n: "<|endoftext|>\n<|user|>\nq\n<|assistant|>\na\n" * (n // 42),
    "a system turn, exchanges": lambda n: (
        "<|system|>\n" + "s " * (n // 4) + "\n<|user|>\nq\n<|assistant|>\na\n" * (n // 56)
    ),
}


def seconds(work) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main(n=1_250_000):
    print(platform.platform(), platform.machine(), f"{os.cpu_count()} cores, Python {platform.python_version()}")
    encoders = [
        sft.load_encoder(str(folder), str(folder), "dolores") for folder in (parts.smollm2(), parts.llama31_tokenizer())
    ]
    args = sft.parse_args(["--input-format", "chatml"])

    def measure(make, size):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_DATASETS_CACHE"] = folder
            file = str(Path(folder) / "d")
            Path(file).write_text(make(size))
            read = seconds(lambda: sft.read_data(sft.find_files([file]), args))
            conversations = list(sft.read_conversations([file], "chatml"))

        def encode(encoder):
            counts = {"split": 0, "dropped": 0, "dropped_exchanges": 0, "lost_trained_tokens": 0}
            for i in range(0, len(conversations), 256):
                sft.encode_conversations(conversations[i : i + 256], encoder, 2048, "split", counts, [])

        return [read, *(seconds(lambda e=e: encode(e)) for e in encoders)]

    for name, make in DATA.items():
        found = [measure(make, size) for size in (n, 2 * n, 4 * n, 8 * n)]
        cells = "".join(" / ".join(f"{part:5.2f}" for part in times).rjust(24) for times in found)
        print(f"{name:<25}{cells}{sum(found[-1]) / sum(found[0]):7.1f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
