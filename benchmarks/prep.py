#!/usr/bin/env python3
"""Data preparation: ours beside the bare tokenizer's batch call on the same text, and beside TRL's.

    python benchmarks/prep.py                        # 10,000 conversations
    python benchmarks/prep.py --conversations 1000 --rounds 1

The conversations are put together from train.chatml's turns, written on the spot, encoded with Llama 3.1's vocabulary.
Runs alternate, each in a process of its own; imports and the loading of the tokenizer are outside the clock.
- tokenizer: one batch call on the finished texts, already in memory. Nothing else: the floor.
- ours: the ChatML file is parsed and checked, encoded with labels, written to disk as Arrow, packed.
- TRL: `load_dataset` of the same conversations as JSON lines, then SFTTrainer's own preparation with packing and
  assistant-only labels (only where trl is installed).
MB are those of the ChatML file. Peak RSS is the kernel's figure, less what the process held before it began.
"""

import argparse
import datetime
import json
import os
import platform
import random
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VARIANTS = ("tokenizer", "ours", "TRL")


def write_conversations(count: int, folder: Path, seed=0) -> None:
    """data.chatml and data.jsonl: `count` conversations of 1 to 4 exchanges, some with a system turn."""
    import train_sft_dolores as trainer

    turns = {role: [] for role in trainer.ROLES}
    for conversation in trainer.read_conversations([str(ROOT / "train.chatml")], "chatml"):
        for turn in conversation.turns:
            turns[turn.role].append(turn.content)
    draw = random.Random(seed)
    with open(folder / "data.chatml", "w", encoding="utf-8") as chatml, open(folder / "data.jsonl", "w") as lines:
        for _ in range(count):
            roles = ["system"] * (draw.random() < 0.3) + ["user", "assistant"] * draw.choice([1, 1, 2, 2, 3, 4])
            messages = [{"role": role, "content": draw.choice(turns[role])} for role in roles if turns[role]]
            print(*(f"<|{m['role']}|>\n{m['content']}" for m in messages), "<|endoftext|>", sep="\n", file=chatml)
            print(json.dumps({"messages": messages}, ensure_ascii=False), file=lines)


def tokenizer():
    import parts
    from transformers import AutoTokenizer

    import train_sft_dolores as trainer

    tokenizer = AutoTokenizer.from_pretrained(parts.llama31_tokenizer())
    chat = trainer.chat_format("dolores", tokenizer)
    tokenizer.chat_template = trainer.chat_template(chat)
    return tokenizer, chat


def run_tokenizer(folder: Path) -> dict:
    bare, chat = tokenizer()
    texts = []
    for line in open(folder / "data.jsonl"):
        messages = json.loads(line)["messages"]
        ends = {"assistant": chat.answer_end}
        texts.append("".join(chat.header.format(role=m["role"]) + m["content"] + ends.get(m["role"], chat.turn_end) for m in messages))  # fmt: skip
    clock = Clock()
    encoded = bare(texts, return_attention_mask=False).input_ids
    return clock.stop() | {"tokens": sum(map(len, encoded))}


def run_ours(folder: Path) -> dict:
    import datasets  # noqa: F401

    import train_sft_dolores as trainer

    encode = trainer.Encoder(*tokenizer())
    args = trainer.parse_args(["--eval-fraction", "0"])
    args.process, args.processes = 0, 1
    clock = Clock()
    rows, _, counts, *_ = trainer.make_rows([str(folder / "data.chatml")], [], args, encode)
    done = clock.stop() | {name: counts[name] for name in ("tokens", "trained_tokens", "rows", "fill")}
    assert sum(len(ids) for ids in rows[0]["input_ids"]) <= args.max_length
    return done


def run_trl(folder: Path) -> dict:
    import torch
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    bare, chat = tokenizer()
    bare.pad_token = "<|finetune_right_pad_id|>"
    # The same format with TRL's markers around what is trained: the answer and its end token.
    bare.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '" + chat.eos_token + "' }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(bare), **shape))
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_length=2048, packing=True, assistant_only_loss=True, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    data = load_dataset("json", data_files=str(folder / "data.jsonl"), split="train", cache_dir=str(folder / "json"))
    rows = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=bare).train_dataset
    done = clock.stop()
    tokens = sum(map(len, rows["input_ids"]))
    trained = sum(label != -100 for labels in rows["labels"] for label in labels)
    return done | {"tokens": tokens, "trained_tokens": trained, "rows": len(rows), "fill": tokens / len(rows) / 2048}


class Clock:
    """Seconds, and MiB of resident memory on top of what there was."""

    def __init__(self):
        with open("/proc/self/statm") as pages:
            self.resident = int(pages.read().split()[1]) * resource.getpagesize()
        self.start = time.perf_counter()

    def stop(self) -> dict:
        seconds = time.perf_counter() - self.start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": seconds, "mib": (peak - self.resident) / 2**20}


def measured(variant: str, folder: Path) -> dict:
    """What one variant says of itself, in a process and with a cache of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, __file__, "--run", variant, "--folder", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{variant}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--conversations", type=int, default=10_000, help="how many to prepare")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs; medians are shown")
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps({"tokenizer": run_tokenizer, "ours": run_ours, "TRL": run_trl}[args.run](args.folder)))
        return
    print(f"command   {shlex.join(['python', *sys.argv])}")
    print(f"machine   {platform.machine()}, {os.cpu_count()} cores; {datetime.date.today()}")
    variants = [name for name in VARIANTS if name != "TRL" or find_spec("trl")]
    with tempfile.TemporaryDirectory(prefix="prep-benchmark-") as name:
        folder = Path(name)
        write_conversations(args.conversations, folder)
        size = (folder / "data.chatml").stat().st_size / 1e6
        runs = {variant: [] for variant in variants}
        for _ in range(args.rounds):
            for variant in variants:
                runs[variant].append(measured(variant, folder))
    print(f"data      {args.conversations:,} conversations, {size:.1f} MB\n")
    print(f"{'':10} seconds   MB/s   of the tokenizer      tokens   trained   rows     fill   peak RSS above start")
    middle = {variant: statistics.median(run["seconds"] for run in runs[variant]) for variant in variants}
    for variant in variants:
        run, seconds = runs[variant][0], middle[variant]
        share = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs["tokenizer"], runs[variant], strict=True))  # fmt: skip
        rows = f"{run['trained_tokens'] / run['tokens']:9.1%} {run['rows']:6,} {run['fill']:8.2%}" if "rows" in run else " " * 25
        mib = max(run["mib"] for run in runs[variant])
        print(f"{variant:10}{seconds:8.2f}{size / seconds:7.2f}{share:19.0%}{run['tokens']:12,} {rows}{mib:17,.0f} MiB")


if __name__ == "__main__":
    main()
