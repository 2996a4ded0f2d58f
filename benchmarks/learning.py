#!/usr/bin/env python3
"""Which settings a small model learns better with, by the number of dialogues. SmolLM2-135M, on a CPU.

    python benchmarks/learning.py            # 50 to 5,000 dialogues, three seeds each: many hours on one core
    python benchmarks/learning.py --table    # only of the runs that are finished

The data are chats between people in English, cut into single exchanges; those of 100 chats are held out. For each number
of dialogues one run has the center's settings; the others change one of them: learning rate, rows in an optimizer step,
passes or rank. The most useful runs come first. Finished runs stay in --folder, so a stopped benchmark continues; to use
two cores, start it twice: each takes the next free run.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import llama
import parts

import train_sft_dolores as sft

SEEDS = (1, 2, 3)
STUDENT_T = 4.303  # for a 95 % interval over three seeds


class Settings(NamedTuple):
    """What a run is trained on and with, but for its seed."""

    size: int  # dialogues
    epochs: int
    rows: int  # in an optimizer step
    packing: bool = True
    learning_rate: float = 4.5e-4
    r: int = 32

    def __str__(self) -> str:
        rows = f"rows{self.rows}" if self.packing else "unpacked"
        return f"{self.size}-epochs{self.epochs}-{rows}-lr{self.learning_rate:g}-r{self.r}"


CENTERS = [Settings(50, 3, 1), Settings(200, 3, 4), Settings(1000, 3, 20), Settings(5000, 1, 32)]


def variations() -> list[Settings]:
    """The settings to run, the most useful first; each but the centers differs from its center in one thing."""
    c50, c200, c1000, c5000 = CENTERS
    rates = {c.size: [c._replace(learning_rate=rate) for rate in (1.5e-4, 1.35e-3)] for c in CENTERS}
    rows = {
        50: [c50._replace(packing=False), c50._replace(rows=4)],
        200: [c200._replace(rows=1), c200._replace(rows=16)],
        1000: [c1000._replace(rows=8), c1000._replace(rows=5), c1000._replace(rows=80)],
        5000: [c5000._replace(rows=8)],
    }
    epochs = [c._replace(epochs=n) for c in (c50, c200) for n in (1, 6)] + [c1000._replace(epochs=1)]
    ranks = {c.size: [c._replace(r=r) for r in (8, 64)] for c in (c50, c200, c1000)}
    cheap = [c50, c200, *rates[200], *rows[200], c1000, *rates[50], *rows[50], *epochs, *ranks[50], *ranks[200]]
    dear = [c5000, *rates[1000], *rates[5000], *rows[5000], *rows[1000], *ranks[1000]]
    return [*cheap, *dear, c1000._replace(epochs=6), c5000._replace(epochs=3)]


def exchanges() -> tuple[list[list[dict]], list[list[dict]]]:
    """Single exchanges of 3 to 20 words a side, held out and to train on, from chats between people (chitchat-dataset).

    A chat's first exchange, which is mostly "hi", is left out; at most three of the others are taken.
    """
    chats = json.loads(parts.member("chitchat-dataset==0.9.0", "dataset.json", "d2a5d0bf"))
    found = []
    for key in sorted(chats):
        turns = ["\n".join(message["text"].strip() for message in run) for run in chats[key]["messages"]]
        pairs = zip(turns[2::2], turns[3::2], strict=False)
        fitting = [pair for pair in pairs if all(3 <= len(text.split()) <= 20 for text in pair)]
        if fitting:
            roles = ("user", "assistant")
            found.append(
                [[{"role": r, "content": text} for r, text in zip(roles, p, strict=True)] for p in fitting[:3]]
            )
    random.Random(0).shuffle(found)
    return [chat[0] for chat in found[:100]], [pair for chat in found[100:] for pair in chat]


def run(wanted: Settings, seed: int, output: Path, base: Path, precision: str) -> None:
    """One run of the trainer; its losses stay in `output`.json."""
    held_out, rest = exchanges()
    files = Path(f"{output}.jsonl"), Path(f"{output}.held_out.jsonl")
    for file, chats in zip(files, (random.Random(seed).sample(rest, wanted.size), held_out), strict=True):
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    batch = max(n for n in range(1, 9) if wanted.rows % n == 0)
    command = [sys.executable, llama.ROOT / "train_sft_dolores.py", "--model", base, "--output", output,
               "--train-files", files[0], "--eval-files", files[1], "--no-bnb-nf4", precision, "--optim", "adamw_torch",
               "--lora-dropout", 0, "--sample-prompts", "none", "--max-length", 160, "--train-batch-size", batch,
               "--eval-batch-size", 8, "--grad-accum", wanted.rows // batch, "--learning-rate", wanted.learning_rate,
               "--lora-r", wanted.r, "--lora-alpha", 2 * wanted.r, "--seed", seed, "--epochs", wanted.epochs,
               *([] if wanted.packing else ["--no-packing"])]  # fmt: skip
    args = sft.parse_args([str(word) for word in command[2:]])
    counts = sft.make_plan(args, sft.World(), sft.find_base(args, str(base))).counts
    every = counts["steps_per_epoch"] if wanted.epochs > 1 else -(-counts["steps"] // 4)
    steps = ["--eval-steps", str(every), "--save-steps", str(every), "--save-total-limit", "1", "--overwrite"]
    with open(f"{output}.log", "w") as log:
        subprocess.run([*map(str, command), *steps], check=True, stdout=log, stderr=log)
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    before = json.loads((output / "training_args.json").read_text())["results"]["eval_loss_before"]
    losses = [before, *(log["eval_loss"] for log in history if "eval_loss" in log)]
    Path(f"{output}.json").write_text(json.dumps({"steps": counts["steps"], "losses": losses}) + "\n")
    shutil.rmtree(output)  # a hundred adapters and checkpoints would be 25 GB
    print(output.name, counts["steps"], "steps", " ".join(f"{loss:.3f}" for loss in losses), flush=True)


def table(folder: Path) -> None:
    """The finished settings, with 95 % intervals over the seeds; differences are paired by seed."""
    found = {}
    for wanted in variations():
        files = [folder / f"{wanted}-seed{seed}.json" for seed in SEEDS]
        if all(file.exists() for file in files):
            found[wanted] = [json.loads(file.read_text()) for file in files]
    lowest = {wanted: [min(run["losses"]) for run in runs] for wanted, runs in found.items()}
    for center in (center for center in CENTERS if center in found):
        print(
            f"\n| {center.size:,} dialogues | steps | lowest held-out loss | less the center's | means of all losses |"
        )
        print("|---|---|---|---|---|")
        for wanted, runs in found.items():
            if wanted.size == center.size:
                changed = [f"{k} {v}" for k, v, c in zip(wanted._fields, wanted, center, strict=True) if v != c]
                less = [a - b for a, b in zip(lowest[wanted], lowest[center], strict=True)]
                curve = [statistics.mean(losses) for losses in zip(*(run["losses"] for run in runs), strict=True)]
                cells = [", ".join(changed) or f"center: {center}", round(statistics.mean(r["steps"] for r in runs)),
                         interval(lowest[wanted]), interval(less, "+") if changed else "",
                         " ".join(f"{loss:.3f}" for loss in curve)]  # fmt: skip
                print("|", " | ".join(map(str, cells)), "|")


def interval(values: list[float], sign: str = "") -> str:
    """Mean and half of the 95 % interval over three seeds."""
    half = STUDENT_T * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{sign}.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--most", type=int, help="settings to run: the first ones")
    parser.add_argument("--base", type=Path, help="model folder; SmolLM2-135M-Instruct where none is given")
    parser.add_argument("--precision", default="--bf16", choices=("--bf16", "--no-bf16"), help="what is quicker here")
    parser.add_argument("--folder", type=Path, default=Path("runs_learning"), help="where to work; finished runs stay")
    args = parser.parse_args()
    if not args.table:
        llama.print_machine("torch", "transformers", "peft")
        args.folder.mkdir(parents=True, exist_ok=True)
        for wanted, seed in itertools.product(variations()[: args.most], SEEDS):
            output = args.folder / f"{wanted}-seed{seed}"
            with open(f"{output}.lock", "w") as lock, contextlib.suppress(BlockingIOError):  # a second process is at it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not Path(f"{output}.json").exists():
                    run(wanted, seed, output, args.base or parts.smollm2(), args.precision)
    table(args.folder)


if __name__ == "__main__":
    main()
