#!/usr/bin/env python3
"""Training speed and memory on a CPU: SmolLM2-135M in bf16 with LoRA r=16, ours and TRL 1.16.

    python benchmarks/train_cpu.py                # two rounds, about eight minutes on two cores
    python benchmarks/train_cpu.py --sides ours "TRL 1.16" --rounds 1

The same packed rows of train.chatml in the same order, the same LoRA, optimizer and number of threads; each run is a
process of its own, the sides take turns. Speed is the median over the steps after the first, tokens of a row counted
whole; peak memory is the kernel's figure for the process. The first losses are held against each other. "x product" is
the trainer's CPU_UTILIZATION: its FLOPs in a second of processor time over those of numpy's matrix product.

What TRL skips on CUDA only: there its head sees trained tokens alone and runs in Triton kernels; on a CPU it computes
the logits of all tokens, in torch, and keeps the dtype of attention and LoRA that it has on CUDA.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import llama
import sides

SIDES = {  # options of the trainer; TRL's: checkpointing or not
    "TRL 1.16": False,
    "ours": ("--gradient-checkpointing", "none"),
    "ours, float32": ("--gradient-checkpointing", "none", "--no-bf16"),
    "ours, compiled": ("--gradient-checkpointing", "none", "--compile"),
    "TRL 1.16, checkpointing": True,
    "ours, checkpointing": ("--gradient-checkpointing", "all"),
}


def train(side: str, folder: Path, base: Path, steps: int, length: int) -> dict:
    """One run of one side in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    sft, which = sides.sft, SIDES[side]
    options = () if isinstance(which, bool) else which
    args = sides.arguments(folder / "out", "--model", base, "--train-files", llama.ROOT / "train.chatml", "--no-bnb-nf4",
                           "--max-length", length, "--optim", "adamw_torch", "--lora-r", 16, "--lora-alpha", 32,
                           "--lora-dropout", 0, "--grad-accum", 1, "--lr-scheduler-type", "constant", *options)  # fmt: skip
    sft.load_libraries()
    encode = sft.load_encoder(str(base), str(base), args.chat_format)
    data = sft.prepare_data(args, sft.World(), sft.find_files(args.train_files), {}, encode)
    flop = sft.training_flop(args, sft.read_config(str(base), str(base)), data.counts) / data.counts["tokens"]
    rows = data.train_rows
    full = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i]["input_ids"])))
    rows = sft.Rows(rows.samples, [rows.plan[i] for i in sorted(full[:steps])])
    tokens = sum(len(ids) for i in range(steps) for ids in rows[i]["input_ids"]) / steps
    set_seed(args.seed)
    if isinstance(which, bool):
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        trainer = sides.trl(args, model, rows, tokenizer, checkpointing=which)
    else:
        trainer = sides.ours(args, sft.load_base(args, str(base), torch.device("cpu")), rows)
    product = sft.product_speed(time.process_time)
    result = sides.timed(trainer, tokens, warm_up=1)
    return result | {"tokens": tokens, "utilization": flop / result["cpu_seconds"] / product}


def run(side: str, folder: Path, args) -> dict:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--base", str(args.base)]
    command += ["--steps", str(args.steps), "--length", str(args.length)]
    return llama.answer_of(command, folder, HF_DATASETS_CACHE=str(folder / "cache"))


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", type=Path, help="model folder; SmolLM2-135M-Instruct where none is given")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES), help="which to run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of one row each; the first is not timed")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        result = train(args.side, args.folder, args.base, args.steps, args.length)
        print(json.dumps(result))
        return
    if not args.base:
        import parts

        args.base = parts.smollm2()
    with tempfile.TemporaryDirectory(prefix="train-benchmark-", dir=args.folder) as name:
        print(f"machine   {llama.machine()}")
        print(f"versions  {llama.versions('torch', 'transformers', 'peft', 'trl')}")
        runs = {side: [] for side in args.sides}
        for number in range(args.rounds):
            for side in args.sides:
                runs[side].append(run(side, Path(name), args))
                print(
                    f"  round {number + 1}  {side:<24}{runs[side][-1]['tokens_per_second']:8.1f} tokens/s", flush=True
                )
    speed = {side: statistics.median(r["tokens_per_second"] for r in found) for side, found in runs.items()}
    print(f"\n{'':<24}{'tokens/s':>9}{'x TRL':>7}{'x product':>11}{'peak GiB':>10}{'step 1':>8}{'losses':>10}")
    for side, found in runs.items():
        peer = f"TRL 1.16{', checkpointing' if 'checkpointing' in side else ''}"
        ratio = f"{speed[side] / speed[peer]:.2f}" if peer in speed else "-"
        ours = "TRL" not in side  # TRL does other work
        utilization = f"{statistics.median(r['utilization'] for r in found):.2f}" if ours else "-"
        losses = " ".join(f"{loss:.4f}" for loss in found[0]["losses"])
        print(f"{side:<24}{speed[side]:>9.1f}{ratio:>7}{utilization:>11}{max(r['peak'] for r in found):>10.2f}"
              f"{statistics.median(r['first_step_seconds'] for r in found):>7.1f}s  {losses}")  # fmt: skip
    first = [r["losses"][0] for found in runs.values() for r in found]
    spread = (max(first) - min(first)) / min(first)
    print(f"\nfirst-step losses differ by {spread:.2%}; rows of {runs[args.sides[0]][0]['tokens']:.0f} tokens")
    if spread > 0.01:
        sys.exit("the sides do not train on the same thing")


if __name__ == "__main__":
    main()
