"""Runs of the training script in processes of their own, which start in a moment.

A fork server has imported torch and the rest once; each run is forked from it, with its own standard
output in a file, and can be signalled or killed like any process.
"""

import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "transformers", "peft", "datasets", "bitsandbytes", "matplotlib.pyplot", "runs"]
)
sys.path[:0] = [str(ROOT)]

TINY = ("--no-bf16", "--no-bnb-nf4", "--optim", "adamw_torch", "--max-length", "128", "--grad-accum", "2", "--lora-r", "4",
        "--lora-alpha", "8", "--learning-rate", "1e-2", "--eval-steps", "2", "--save-steps", "2", "--sample-prompts", "none")  # fmt: skip


def mark(name: str, times: int, file: str):
    """Make `file` when the script enters its function of this name for the so-manieth time."""

    def look(frame, event, _):
        nonlocal times
        if event == "call" and frame.f_code.co_name == name and "train_sft_dolores" in frame.f_code.co_filename:
            times -= 1
            if not times:
                sys.setprofile(None)
                Path(file).touch()

    sys.setprofile(look)


def child(argv: list[str], folder: str, log: str, moment: tuple | None):
    os.chdir(folder)
    with open(log, "a", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = [str(ROOT / "train_sft_dolores.py"), *argv]
    import torch

    torch.set_num_threads(1)  # sums in one order, whatever the machine: runs are compared bit for bit
    import train_sft_dolores

    if moment:
        mark(*moment, str(Path(folder, "moment")))
    train_sft_dolores.main()


def start(folder: Path, *options, log="log.txt", moment=None):
    """A running process of the script in `folder`; at `moment` (function, nth call) it makes a file of that name."""
    process = SERVER.Process(target=child, args=([str(o) for o in options], str(folder), str(folder / log), moment))
    process.start()
    return process


def run(folder: Path, *options, log="log.txt", timeout=240) -> tuple[int, str]:
    """(exit status, what it printed) of a run to its end."""
    before = (folder / log).stat().st_size if (folder / log).exists() else 0
    process = start(folder, *options, log=log)
    process.join(timeout)
    assert process.exitcode is not None, f"still running: {(folder / log).read_text()[-2000:]}"
    return process.exitcode, unwrapped((folder / log).read_text()[before:])


def unwrapped(printed: str) -> str:
    """One line for each thing said, however many it took at 80 columns."""
    return re.sub(r"\n {11}(?=\S)", " ", printed)


def record(folder: Path, output="out") -> dict:
    return json.loads((folder / output / "training_args.json").read_text())


WORDS = ["un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix"]


def dialogues(count: int) -> str:
    """Short conversations, all different."""
    text = ""
    for i in range(count):
        pick = [WORDS[(i * k + k) % len(WORDS)] for k in range(1, 9)]
        text += f"<|system|>\nTu es Dolores numéro {i}.\n<|user|>\n{' '.join(pick[:4])} ?\n<|assistant|>\n{' '.join(pick)}.\n"
    return text
