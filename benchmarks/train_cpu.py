#!/usr/bin/env python3
"""Training speed and memory on a CPU: SmolLM2-135M with LoRA r=16, ours and TRL 1.16.

    python benchmarks/train_cpu.py                # three rounds, about eight minutes on two cores
    python benchmarks/train_cpu.py --sides ours TRL --rounds 1

The same packed rows of train.chatml in the same order, the same LoRA, optimizer and number of threads; each run is a
process of its own, the sides take turns. Speed is the median over the steps after the first, tokens of a row counted
whole; peak memory is the kernel's figure for the process. The first losses must be equal.

What TRL skips on CUDA only: there its head sees trained tokens alone and runs in Triton kernels; on a CPU it computes
the logits of all tokens, in torch, and keeps the dtype of attention and LoRA that it has on CUDA.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import llama
import sides

SIDES = ("TRL", "ours", "TRL, float32", "ours, float32")


def train(side: str, options) -> dict:
    """One run of one side in this process."""
    import parts
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    sft, base, device = sides.sft, str(options.base or parts.smollm2()), torch.device("cpu")
    precision = "--no-bf16" if "float32" in side else "--bf16"
    args = sides.arguments(options.folder / "out", "--model", base, "--train-files", llama.ROOT / "train.chatml",
                           "--no-bnb-nf4", "--max-length", options.length, "--optim", "adamw_torch", "--lora-r", 16,
                           "--lora-alpha", 32, "--lora-dropout", 0, "--grad-accum", 1, "--lr-scheduler-type", "constant",
                           "--gradient-checkpointing", "none", precision)  # fmt: skip
    sft.load_libraries()
    plan = sft.make_plan(args, sft.World(), sft.find_base(args, base))
    rows = plan.train_rows
    full = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i]["input_ids"])))
    rows = sft.Rows(rows.samples, [rows.plan[i] for i in sorted(full[: options.steps])])
    tokens = sum(len(ids) for i in range(options.steps) for ids in rows[i]["input_ids"]) / options.steps
    set_seed(args.seed)
    if "TRL" in side:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if args.bf16 else torch.float32)
        trainer = sides.trl(args, model, rows, AutoTokenizer.from_pretrained(base), checkpointing=False)
    else:
        trainer = sides.ours(plan._replace(train_rows=rows), sft.load_base(args, base, device), device)
    return sides.timed(trainer, tokens, warm_up=1) | {"tokens": tokens}


def main() -> None:
    parser = llama.side_parser(SIDES)
    add = parser.add_argument
    add("--base", type=Path, help="model folder; SmolLM2-135M-Instruct where none is given")
    add("--steps", type=int, default=4, help="optimizer steps of one row each; the first is not timed")
    add("--length", type=int, default=1024, help="tokens in a row")
    options = parser.parse_args()
    if options.folder:
        return print(json.dumps(train(options.sides[0], options)))

    llama.print_machine("torch", "transformers", "peft", "trl")
    with tempfile.TemporaryDirectory(prefix="train-benchmark-") as folder:
        runs = llama.take_turns(options, Path(folder))
    speed = {side: statistics.median(r["tokens_per_second"] for r in found) for side, found in runs.items()}
    print(f"\n{'':<24}{'tokens/s':>9}{'x TRL':>7}{'peak GiB':>10}{'step 1':>8}  losses")
    for side, found in runs.items():
        peer = side.replace("ours", "TRL")
        ratio = f"{speed[side] / speed[peer]:.2f}" if peer in speed else "-"
        losses = " ".join(f"{loss:.4f}" for loss in found[0]["losses"])
        first = statistics.median(r["first_step_seconds"] for r in found)
        peak = max(r["peak"] for r in found)
        print(f"{side:<24}{speed[side]:>9.1f}{ratio:>7}{peak:>10.2f}{first:>7.1f}s  {losses}")
    first = [r["losses"][0] for found in runs.values() for r in found]
    spread = (max(first) - min(first)) / min(first)
    print(f"\nfirst-step losses differ by {spread:.2%}; rows of {runs[options.sides[0]][0]['tokens']:.0f} tokens")
    if spread > 0.01:
        sys.exit("the sides do not train on the same thing")


if __name__ == "__main__":
    main()
