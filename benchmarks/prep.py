#!/usr/bin/env python3
"""Time and memory of preparing data: ours, TRL 1.16, and the bare tokenizer's batch call.

    python benchmarks/prep.py                              # 10,000 conversations
    python benchmarks/prep.py --conversations 100000 --sides "bare tokenizer" ours

The conversations are sentences of train.chatml in random order, encoded with Llama 3.1's vocabulary. Ours is what
training does before it loads a model: read, check, encode, write to disk, measure and pack.
TRL's is load_dataset and SFTTrainer's preparation with assistant_only_loss and packing="bfd". Each run is a process
of its own with an empty cache, the sides take turns; seconds are those of the preparation, without imports; peak
memory is the kernel's figure for the process, imports included. MB are those of the ChatML file for every side.
"""

import json
import random
import re
import shutil
import statistics
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


def write_data(folder: Path, count: int) -> float:
    """data.chatml and the same conversations as data.jsonl; the size of the first in MB."""
    turns = [turn for c in sft.read_conversations([str(llama.ROOT / "train.chatml")], "chatml") for turn in c.turns]
    # Without tags: the two formats do not escape them alike, and every side shall have the same text.
    sentences = {role: [s for t in turns if t.role == role for s in re.split(r"(?<=[.!?…])\s+", t.content)
                        if s.strip() and "<|" not in s] for role in sft.ROLES}  # fmt: skip
    draw = random.Random(0)

    def turn(role: str, most: int) -> dict:
        return {"role": role, "content": " ".join(draw.choices(sentences[role], k=draw.randint(1, most)))}

    with open(folder / "data.chatml", "w", encoding="utf-8") as chatml, open(folder / "data.jsonl", "w") as rows:
        for _ in range(count):
            said = [turn("system", 1)]
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                said += [turn("user", 4), turn("assistant", 12)]
            chatml.writelines("<|{role}|>\n{content}\n".format(**turn) for turn in said)
            rows.write(json.dumps({"messages": said}) + "\n")
    return (folder / "data.chatml").stat().st_size / 1e6


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
    """The trainer's preparation."""
    import datasets  # noqa: F401 - not timed, as TRL's imports are not
    import parts

    args = sft.parse_args(["--train-files", str(folder / "data.chatml"), "--eval-fraction", "0"])
    encode = sft.load_encoder("Llama 3.1", str(parts.llama31_tokenizer()), args.chat_format)
    start = time.monotonic()
    counts = sft.make_plan(args, sft.World(), sft.Base("", None, {}, encode)).counts
    return {"seconds": time.monotonic() - start, "tokens": counts["tokens"], "rows": counts["rows"],
            "trained": counts["trained_tokens"], "fill": counts["fill"]}  # fmt: skip


def trl(folder: Path) -> dict:
    """TRL's, of a model that is next to nothing."""
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
    data = load_dataset("json", data_files=str(folder / "data.jsonl"), split="train")
    loaded = time.monotonic() - start
    trainer = Timed(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    tokens = trained = 0
    for batch in trainer.train_dataset.with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks().values.to_numpy()
        tokens, trained = tokens + len(labels), trained + int((labels != sft.IGNORE).sum())
    rows = len(trainer.train_dataset)
    return {"seconds": loaded + trainer.seconds, "tokens": tokens, "rows": rows, "trained": trained,
            "fill": tokens / (rows * args.max_length)}  # fmt: skip


SIDES = {"bare tokenizer": bare, "TRL 1.16": trl, "ours": ours, "ours, second start": ours}


def main() -> None:
    parser = llama.side_parser(SIDES)
    parser.add_argument("--conversations", type=int, default=10_000, help="how many to prepare")
    options = parser.parse_args()
    if options.folder:
        (side,) = options.sides
        if side != "ours, second start":
            shutil.rmtree(options.folder / "cache", ignore_errors=True)
        return print(json.dumps(SIDES[side](options.folder)))

    llama.print_machine("tokenizers", "datasets", "trl", "transformers")
    with tempfile.TemporaryDirectory(prefix="prep-benchmark-") as folder:
        size = write_data(Path(folder), options.conversations)
        print(f"data      {options.conversations:,} conversations, {size:.1f} MB", flush=True)
        runs = llama.take_turns(options, Path(folder))
    print(f"\n{'':<20}{'s':>8}{'MB/s':>8}{'peak GiB':>10}{'tokens':>13}{'trained':>13}{'rows':>9}{'full':>8}")
    for side, found in runs.items():
        first, seconds = found[0], statistics.median(r["seconds"] for r in found)
        rest = f"{first['trained']:>13,}{first['rows']:>9,}{first['fill']:>8.1%}" if "rows" in first else ""
        peak = max(r["peak"] for r in found)
        print(f"{side:<20}{seconds:>8.2f}{size / seconds:>8.2f}{peak:>10.2f}{first['tokens']:>13,}{rest}")


if __name__ == "__main__":
    main()
