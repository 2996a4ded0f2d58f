#!/usr/bin/env python3
"""Time and memory of preparing data: ours, TRL 1.16, and the bare tokenizer's batch call.

    python benchmarks/prep.py                              # 10,000 conversations
    python benchmarks/prep.py --conversations 1000000      # TRL then gets --trl-conversations of them

The conversations are sentences of train.chatml in random order, encoded with Llama 3.1's vocabulary. Ours is what
training does before it loads a model: read, check, encode, write to disk, measure and pack.
TRL's is load_dataset and SFTTrainer's preparation with assistant_only_loss and packing="bfd". Each run is a process
of its own with an empty cache, the sides take turns; seconds are those of the preparation, without imports; peak
memory is the kernel's figure for the largest process, imports included. MB are those of the ChatML file for every side.
"""

import argparse
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import llama

import train_sft_dolores as sft

TRL_TEMPLATE = (  # the trainer's format "dolores" with TRL's markers around what is trained
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)


def write_data(folder: Path, count: int, trl_count: int):
    """data.chatml, and trl.jsonl with the first of its conversations."""
    turns = [turn for c in sft.read_conversations([str(llama.ROOT / "train.chatml")], "chatml") for turn in c.turns]
    # Without tags: the two formats do not escape them alike, and every side shall have the same text.
    sentences = {role: [s for t in turns if t.role == role for s in re.split(r"(?<=[.!?…])\s+", t.content)
                        if s.strip() and "<|" not in s] for role in sft.ROLES}  # fmt: skip
    draw = random.Random(0)

    def text(role, most):
        return " ".join(draw.choices(sentences[role], k=draw.randint(1, most)))

    with open(folder / "data.chatml", "w", encoding="utf-8") as chatml, open(folder / "trl.jsonl", "w") as trl:
        for number in range(count):
            said = [("system", text("system", 1))]
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                said += [("user", text("user", 4)), ("assistant", text("assistant", 12))]
            chatml.writelines(f"<|{role}|>\n{content}\n" for role, content in said)
            if number < trl_count:
                trl.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in said]}) + "\n")


# ---- The sides, each in a process of its own ----


def bare(folder: Path) -> dict:
    """The tokenizer's batch call, a thousand conversations at a time, their ids thrown away."""
    import parts
    from tokenizers import Tokenizer

    tokenizer, tokens = Tokenizer.from_file(str(parts.llama31_tokenizer() / "tokenizer.json")), 0
    texts = re.split(r"^(?=<\|system\|>)", (folder / "data.chatml").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    start = time.monotonic()
    for first in range(0, len(texts), 1000):
        tokens += sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts[first : first + 1000]))
    return {"seconds": time.monotonic() - start, "tokens": tokens}


def ours(folder: Path) -> dict:
    """Seconds and rows of the trainer's preparation."""
    import datasets  # noqa: F401 - not timed, as TRL's imports are not
    import parts

    args = sft.parse_args(["--train-files", str(folder / "data.chatml"), "--eval-fraction", "0"])
    encode = sft.load_encoder("Llama 3.1", str(parts.llama31_tokenizer()), args.chat_format)
    start = time.monotonic()
    counts = sft.make_plan(args, sft.World(), sft.Base("", None, {}, encode)).counts
    return {"seconds": time.monotonic() - start, "tokens": counts["tokens"], "rows": counts["rows"],
            "trained": counts["trained_tokens"], "fill": counts["fill"]}  # fmt: skip


def trl(folder: Path) -> dict:
    """Seconds and rows of TRL's."""
    import parts
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            start = time.monotonic()
            prepared = super()._prepare_dataset(*args, **kwargs)
            self.seconds = time.monotonic() - start
            return prepared

    tokenizer = AutoTokenizer.from_pretrained(parts.llama31_tokenizer())
    tokenizer.chat_template = TRL_TEMPLATE
    shape = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1))
    args = SFTConfig(output_dir=str(folder / "trl"), max_length=2048, packing=True, packing_strategy="bfd",
                     assistant_only_loss=True, report_to=[], use_cpu=True)  # fmt: skip
    start = time.monotonic()
    data = load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train")
    loaded = time.monotonic() - start
    trainer = Timed(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    rows = trainer.train_dataset.with_format("arrow")
    columns = [
        (len(b["input_ids"].combine_chunks().values), b["labels"].combine_chunks().values) for b in rows.iter(1000)
    ]
    tokens = sum(count for count, _ in columns)
    trained = sum((labels.to_numpy() != -100).sum() for _, labels in columns)
    return {"seconds": loaded + trainer.seconds, "tokens": tokens, "rows": len(rows), "trained": int(trained),
            "fill": tokens / (len(rows) * 2048)}  # fmt: skip


SIDES = {"bare tokenizer": bare, "TRL 1.16": trl, "ours": ours, "ours, second start": ours}


# ---- Taking turns ----


def run(side: str, folder: Path) -> dict:
    """One side in a process of its own, with an empty cache unless it is to be found."""
    cache = folder / "cache"
    if side != "ours, second start":
        shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    return llama.answer_of(command, folder, HF_DATASETS_CACHE=str(cache))


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--conversations", type=int, default=10_000, help="how many to prepare")
    parser.add_argument("--trl-conversations", type=int, default=100_000, help="at most so many for TRL")
    parser.add_argument(
        "--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES), metavar="SIDE", help="which to run"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="prep-benchmark-", dir=args.folder) as name:
        folder, trl_count = Path(name), min(args.trl_conversations, args.conversations)
        write_data(folder, args.conversations, trl_count)
        size = (folder / "data.chatml").stat().st_size / 1e6
        print(
            f"machine   {llama.machine()}\nversions  {llama.versions('tokenizers', 'datasets', 'trl', 'transformers')}"
        )
        print(f"data      {args.conversations:,} conversations, {size:.1f} MB; TRL's {trl_count:,}", flush=True)
        runs = {side: [] for side in args.sides}
        for _ in range(args.rounds):
            for side in args.sides:
                runs[side].append(run(side, folder))
        print(f"\n{'':<20}{'s':>8}{'MB/s':>8}{'peak GiB':>10}{'tokens':>13}{'trained':>13}{'rows':>9}{'full':>8}")
        for side, found in runs.items():
            first, megabytes = found[0], size * (trl_count / args.conversations if side == "TRL 1.16" else 1)
            seconds = statistics.median(r["seconds"] for r in found)
            rest = f"{first['trained']:>13,}{first['rows']:>9,}{first['fill']:>8.1%}" if "rows" in first else ""
            print(f"{side:<20}{seconds:>8.2f}{megabytes / seconds:>8.2f}{max(r['peak'] for r in found):>10.2f}"
                  f"{first['tokens']:>13,}{rest}")  # fmt: skip


if __name__ == "__main__":
    main()
