#!/usr/bin/env python3
"""Passes, settings and chat formats: which ones a small model learns better with. SmolLM2-135M, on a CPU.

    python benchmarks/learning.py passes     # corpora of 12 to 400 dialogues, three seeds each: some hours on one core
    python benchmarks/learning.py settings   # corpora of 50 to 5,000 dialogues, three seeds each: many hours on one core
    python benchmarks/learning.py table      # of the runs of `settings` that are finished
    python benchmarks/learning.py formats    # --steps for shorter or longer runs

passes: from each conversation of train.chatml its first exchange; 40 of them are held out, the same for all runs. A run
trains on 12, 50, 200 or all others, in a random choice of its seed, and measures the held-out loss before training and
after each pass. Finished runs are kept in --folder, so a stopped benchmark continues.

settings: chats between people in English, cut into single exchanges; those of 100 conversations are held out. For each
size of the corpus one run has the center's settings; the others change one of them: learning rate, rows in an optimizer
step, passes or rank. The most useful runs come first. To use two cores, start it twice: each takes the next free run.

formats: 22 whole conversations are held out, and the rest is trained on in the format of plain role tags and in the
base's own, for the same share of a pass. Loss is the mean over the trained tokens of the held-out conversations, the same
tokens in both formats. The difference comes with a 95 % interval over the choice of held-out conversations; what another
seed of training would do is not in it.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import llama
from llama import ROOT

HELD_OUT = {"passes": 40, "settings": 100, "formats": 22}  # conversations
# Dialogues: (passes, rows in an optimizer step).
SIZES = {12: (6, 1), 50: (5, 2), 200: (3, 4), 0: (2, 4)}  # 0: all that are not held out
SEEDS = (1, 2, 3)
KNOBS = ["--no-bnb-nf4", "--optim", "adamw_torch", "--learning-rate", "5e-4", "--lora-r", "16", "--lora-alpha", "32",
         "--lora-dropout", "0", "--sample-prompts", "none"]  # fmt: skip
QUESTIONS = [
    "Qui es-tu ?", "Comment distinguer ce que je sais de ce que je crois ?", "À quoi sert la mémoire ?",
    "Je n'arrive pas à dormir.", "Pourquoi le temps passe-t-il plus vite avec l'âge ?", "As-tu peur de quelque chose ?",
    "Dois-je quitter mon travail ?", "Qu'est-ce qu'un mensonge utile ?", "Mon père ne me parle plus.",
    "Comment apprendre à se taire ?", "Que faire d'un regret ?", "Es-tu consciente ?", "Pourquoi relire un livre ?",
    "J'ai raté mon examen.", "Qu'est-ce que la patience ?", "Donne-moi un conseil pour écrire.",
    "Pourquoi les gens ont-ils peur du silence ?", "Je me sens seul ce soir.", "Comment finir une amitié ?",
    "Qu'est-ce qui reste d'un voyage ?",
]  # fmt: skip


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
STUDENT_T = 4.303  # for a 95 % interval over three seeds


def variations() -> list[Settings]:
    """The settings to run, the most useful first; each but the centers differs from its center in one thing."""
    c50, c200, c1000, c5000 = CENTERS
    rates = {c.size: [c._replace(learning_rate=rate) for rate in (1.5e-4, 1.35e-3)] for c in CENTERS}
    rows = {
        50: [c50._replace(packing=False), c50._replace(rows=4)],
        200: [c200._replace(rows=1), c200._replace(rows=16)],
        1000: [c1000._replace(rows=5), c1000._replace(rows=80)],
        5000: [c5000._replace(rows=8)],
    }
    epochs = [c._replace(epochs=n) for c in (c50, c200) for n in (1, 6)] + [c1000._replace(epochs=1)]
    ranks = {c.size: [c._replace(r=r) for r in (8, 64)] for c in (c50, c200, c1000)}
    cheap = [c50, c200, *rates[200], *rows[200], c1000, *rates[50], *rows[50], *epochs, *ranks[50], *ranks[200]]
    dear = [c5000, *rates[1000], *rates[5000], *rows[5000], *rows[1000], *ranks[1000]]
    return [*cheap, *dear, c1000._replace(epochs=6), c5000._replace(epochs=3)]


def conversations() -> list[list[dict]]:
    """train.chatml as messages, in a fixed random order."""
    import train_sft_dolores as trainer

    found = list(trainer.read_conversations([str(ROOT / "train.chatml")], "chatml"))
    random.Random(0).shuffle(found)
    return [[{"role": turn.role, "content": turn.content} for turn in c.turns] for c in found]


def exchanges() -> tuple[list[list[dict]], list[list[dict]]]:
    """Single exchanges of 3 to 20 words a side, held out and to train on, from chats between people (chitchat-dataset).

    A chat's first exchange, which is mostly "hi", is left out; at most three of the others are taken.
    """
    import parts

    chats = json.loads(parts.member("chitchat-dataset==0.9.0", "dataset.json", "d2a5d0bf"))
    found = []
    for key in sorted(chats):
        turns = ["\n".join(message["text"].strip() for message in run) for run in chats[key]["messages"]]
        pairs = zip(turns[2::2], turns[3::2], strict=False)
        fitting = [pair for pair in pairs if all(3 <= len(text.split()) <= 20 for text in pair)]
        if fitting:
            found.append([[{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
                          for pair in fitting[:3]])  # fmt: skip
    random.Random(0).shuffle(found)
    held_out, rest = found[: HELD_OUT["settings"]], found[HELD_OUT["settings"] :]
    return [chat[0] for chat in held_out], [pair for chat in rest for pair in chat]


def write(file: Path, chats: list[list[dict]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def command(output: Path, train: Path, held_out: Path, *options: str) -> list[str]:
    import parts

    return [sys.executable, str(ROOT / "train_sft_dolores.py"), "--model", str(parts.smollm2()), "--output", str(output),
            "--train-files", str(train), "--eval-files", str(held_out), *KNOBS, *options]  # fmt: skip


def plan(train: Path, held_out: Path, *options: str) -> dict:
    """What a dry run finds: rows, tokens, steps."""
    report = Path(f"{train}.report.json")
    run = command(report, train, held_out, *options, "--json", str(report))
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())


def every(steps: int) -> list[str]:
    """Options for an evaluation and a checkpoint after so many optimizer steps."""
    return ["--eval-steps", str(steps), "--save-steps", str(steps)]


def train(output: Path, train: Path, held_out: Path, *options: str) -> dict:
    """Run the trainer, or find its finished run: the record, with all its held-out losses in it."""
    if not (output / "adapter_model.safetensors").exists():
        run = [*command(output, train, held_out, *options), "--overwrite"]
        print("$", " ".join(run[1:]).replace(f"{ROOT}/", ""), flush=True)
        with open(f"{output}.log", "w") as log:
            if subprocess.run(run, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode:
                sys.exit(Path(log.name).read_text()[-2000:])
    record = json.loads((output / "training_args.json").read_text())
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    after = [log["eval_loss"] for log in history if "eval_loss" in log]
    return record | {"losses": [record["results"]["eval_loss_before"], *after]}


def samples_of(file: Path, chat_format: str):
    """The held-out samples, as the trainer evaluates them."""
    import parts
    from transformers import AutoTokenizer

    import train_sft_dolores as trainer

    tokenizer = AutoTokenizer.from_pretrained(parts.smollm2())
    encode = trainer.Encoder(tokenizer, trainer.chat_format(chat_format, tokenizer))
    conversations = trainer.read_conversations([str(file)], "messages")
    batches = trainer.encode_conversations(conversations, encode, 1024, "split", lambda *_: None)
    return [sample for batch in batches for sample in batch]


def losses(model, samples):
    """Float64 [conversations, 2]: sum of the losses of the trained tokens, and their number."""
    import numpy as np
    import torch

    found = {}
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids[None].astype(np.int64))).logits[0, :-1]
        targets = torch.from_numpy(sample.labels[1:].astype(np.int64))
        total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        found[sample.digest] = found.get(sample.digest, 0) + np.array([total, (targets >= 0).sum().item()])
    return np.array(list(found.values()))


def difference(a, b) -> str:
    """Loss of a less that of b on the same conversations, with a paired bootstrap over these."""
    import numpy as np

    mean = lambda sums: sums[..., 0].sum(-1) / sums[..., 1].sum(-1)  # noqa: E731
    picks = np.random.default_rng(0).integers(0, len(a), (10_000, len(a)))
    low, high = np.percentile(mean(a[picks]) - mean(b[picks]), [2.5, 97.5])
    higher = int((a[:, 0] / a[:, 1] > b[:, 0] / b[:, 1]).sum())
    return f"{mean(a) - mean(b):+.3f} [{low:+.3f}, {high:+.3f}], higher in {higher} of {len(a)} conversations"


def trained(adapter: Path, held_out: Path):
    """`losses` of the base with this adapter, in its own chat format, float32."""
    import parts
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parts.smollm2(), dtype=torch.float32)
    name = json.loads((adapter / "training_args.json").read_text())["chat_format"]["name"]
    return losses(PeftModel.from_pretrained(model, adapter), samples_of(held_out, name))


def share_that_stops(adapter: Path, with_adapter: bool, longest: int = 200) -> str:
    """How many greedy answers, by the base with or without its adapter, end by themselves within `longest` tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((adapter / "training_args.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(record["base"]["model"], dtype=torch.float32)
    if with_adapter:
        model = PeftModel.from_pretrained(model, adapter)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, inputs.input_ids.shape[1] :]
    ended = (output == tokenizer.eos_token_id).any(1)
    return f"{int(ended.sum())} of {len(ended)}"


def row(*cells) -> None:
    print("|", " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


def table(*head: str) -> None:
    print()
    row(*head)
    row(*["---"] * len(head))


def passes(folder: Path, precision: str) -> None:
    """The held-out loss after each pass, by the size of the corpus."""
    exchanges = []
    for chat in conversations():
        answered = next(i for i, message in enumerate(chat) if message["role"] == "assistant")
        exchanges.append(chat[: answered + 1])
    held_out = write(folder / "held_out.jsonl", exchanges[: HELD_OUT["passes"]])
    rest = exchanges[HELD_OUT["passes"] :]
    table("dialogues", "rows in a step", "steps in a pass", "seed", "held-out loss before and after each pass")
    best: dict[int, list[tuple[int, float, float]]] = {}
    for size, (epochs, rows) in SIZES.items():
        size = size or len(rest)
        for seed in SEEDS:
            chosen = write(folder / f"{size}-{seed}.jsonl", random.Random(seed).sample(rest, size))
            options = [precision, "--max-length", "512", "--grad-accum", str(rows), "--seed", str(seed)]
            steps = plan(chosen, held_out, *options)["steps_per_epoch"]
            options += ["--epochs", str(epochs), *every(steps)]
            losses = train(folder / f"run-{size}-{seed}", chosen, held_out, *options)["losses"]
            row(size, rows, steps, seed, " ".join(f"{loss:.3f}" for loss in losses))
            lowest = min(range(len(losses)), key=losses.__getitem__)
            best.setdefault(size, []).append((lowest, losses[lowest] - losses[0], losses[-1] - losses[lowest]))
    table("dialogues", "best after pass", "change of the loss there (mean, range)", "rise from there to the last pass")
    for size, found in best.items():
        after, gained, lost = zip(*found, strict=True)
        spread = f"{statistics.mean(gained):+.3f} ({min(gained):+.3f} to {max(gained):+.3f})"
        row(size, ", ".join(map(str, after)), spread, f"{statistics.mean(lost):+.3f}")


def settings(folder: Path, precision: str) -> None:
    """The runs of `settings` that are not finished."""
    held_out, rest = exchanges()
    folder.mkdir(parents=True, exist_ok=True)
    for wanted, seed in itertools.product(variations(), SEEDS):
        output = folder / f"{wanted}-seed{seed}"
        with open(f"{output}.lock", "w") as lock, contextlib.suppress(BlockingIOError):  # a second process is at it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not Path(f"{output}.json").exists():
                train_with(wanted, seed, precision, output, random.Random(seed).sample(rest, wanted.size), held_out)
    settings_table(folder)


def train_with(
    wanted: Settings, seed: int, precision: str, output: Path, dialogues: list[list[dict]], held_out: list[list[dict]]
) -> None:
    """One run of `settings`; its losses stay in `output`.json."""
    files = write(Path(f"{output}.jsonl"), dialogues), write(Path(f"{output}.held_out.jsonl"), held_out)
    batch = max(n for n in range(1, 9) if wanted.rows % n == 0)
    options = [precision, "--max-length", "160", "--train-batch-size", str(batch), "--eval-batch-size", "8",
               "--grad-accum", str(wanted.rows // batch), "--learning-rate", str(wanted.learning_rate),
               "--lora-r", str(wanted.r), "--lora-alpha", str(2 * wanted.r), "--seed", str(seed),
               "--epochs", str(wanted.epochs), *([] if wanted.packing else ["--no-packing"])]  # fmt: skip
    counts = plan(*files, *options)
    steps = counts["steps_per_epoch"] if wanted.epochs > 1 else -(-counts["steps"] // 4)
    losses = train(output, *files, *options, *every(steps), "--save-total-limit", "1")["losses"]
    found = {"steps": counts["steps"], "tokens": counts["tokens"], "evaluated_every": steps, "losses": losses}
    Path(f"{output}.json").write_text(json.dumps(found) + "\n")
    shutil.rmtree(output)  # a hundred adapters and checkpoints would be 25 GB
    print(output.name, counts["steps"], "steps", " ".join(f"{loss:.3f}" for loss in losses), flush=True)


def settings_table(folder: Path) -> None:
    """The finished settings, with 95 % intervals over the seeds; differences are paired by seed."""
    found = {}
    for wanted in variations():
        files = [folder / f"{wanted}-seed{seed}.json" for seed in SEEDS]
        if all(file.exists() for file in files):
            found[wanted] = [json.loads(file.read_text()) for file in files]
    lowest = {wanted: [min(run["losses"]) for run in runs] for wanted, runs in found.items()}
    for center in (center for center in CENTERS if center in found):
        table(f"{center.size:,} dialogues", "steps", "lowest held-out loss", "less the center's", "means of all losses")
        for wanted, runs in found.items():
            if wanted.size == center.size:
                changed = [f"{k} {v}" for k, v, c in zip(wanted._fields, wanted, center, strict=True) if v != c]
                name = ", ".join(changed) or f"center: {center}"
                less = [a - b for a, b in zip(lowest[wanted], lowest[center], strict=True)] if changed else []
                curve = [statistics.mean(losses) for losses in zip(*(run["losses"] for run in runs), strict=True)]
                row(name, round(statistics.mean(run["steps"] for run in runs)), interval(lowest[wanted]),
                    interval(less, "+") if less else "", " ".join(f"{loss:.3f}" for loss in curve))  # fmt: skip


def interval(values: list[float], sign: str = "") -> str:
    half = STUDENT_T * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{sign}.3f} ± {half:.3f}"


def formats(folder: Path, precision: str, steps: int) -> None:
    """Plain role tags against the base's own format, after so many optimizer steps of two rows."""
    chats = conversations()
    held_out = write(folder / "formats_held_out.jsonl", chats[: HELD_OUT["formats"]])
    rest = write(folder / "formats.jsonl", chats[HELD_OUT["formats"] :])
    options = [precision, "--max-length", "1024", "--grad-accum", "2"]
    a_pass = plan(rest, held_out, *options)["steps_per_epoch"]
    options += ["--epochs", f"{(steps - 0.5) / a_pass:.5f}", *every(steps)]  # the trainer rounds steps up
    folders, names = (folder / "dolores", folder / "chatml"), ("dolores", "chatml")
    records = [
        train(f, rest, held_out, *options, "--chat-format", name) for f, name in zip(folders, names, strict=True)
    ]
    table("chat format", "steps", "loss before", "after", "answers that stop before", "after")
    for name, record, output in zip(("dolores", "chatml (the base's own)"), records, folders, strict=True):
        stops = [share_that_stops(output, after) for after in (False, True)]
        row(name, record["results"]["steps"], record["losses"][0], record["losses"][-1], *stops)
    print("\ndolores - chatml:", difference(*(trained(output, held_out) for output in folders)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("passes", "settings", "table", "formats"))
    parser.add_argument("--steps", type=int, default=118, help="of formats; 118: one pass (default)")
    parser.add_argument("--precision", default="--bf16", choices=("--bf16", "--no-bf16"), help="what is quicker here")
    parser.add_argument("--folder", type=Path, default=Path("runs_learning"), help="where to work; finished runs stay")
    args = parser.parse_args()
    if args.what == "table":
        return settings_table(args.folder)
    print("machine", llama.machine(), llama.versions("torch", "transformers", "peft"))
    import train_sft_dolores as trainer

    trainer.load_libraries()
    if args.what == "passes":
        passes(args.folder, args.precision)
    elif args.what == "settings":
        settings(args.folder, args.precision)
    else:
        formats(args.folder, args.precision, args.steps)


if __name__ == "__main__":
    main()
