#!/usr/bin/env python3
"""Training speed and memory on a GPU: Llama-3.1-8B's shape in NF4 with LoRA, ours, TRL and the plain Trainer.

    python benchmarks/gpu.py                        # all variants, a 24 GiB cap, under nine minutes
    python benchmarks/gpu.py --variants ours "TRL" --steps 20
    python benchmarks/gpu.py --tiny                 # the same program with a tiny model, on a CPU

Nothing is downloaded: the weights are random and are quantised on the card, the token ids are random too, in rows
packed from documents as long as train.chatml's, two thirds of their tokens trained. Each variant is a process of its
own on the same rows in the same order; if it fails, its line shows the error. Speed is the median over the steps
after the first two; MFU counts 32.4 GFLOP a token, what forward and backward need without recomputation.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import llama
import sides

VARIANTS = {  # how each differs from "ours"
    "TRL": {"peer": "trl"},
    "plain Trainer": {"peer": "plain"},
    "ours": {},
    "ours, compiled": {"options": ("--compile",)},
    "ours, dropout 0": {"options": ("--lora-dropout", 0)},
    "ours, all layers checkpointed": {"options": ("--gradient-checkpointing", "all")},
    "ours, mask instead of varlen": {"attention": "sdpa"},
    "ours, logits of all tokens": {"without": "trained_tokens_only"},
    "ours, PEFT's LoRA forward": {"without": "lean_lora"},
    "ours, fp32 norms and head": {"without": "bf16_norms"},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}  # fmt: skip
FLOP_PER_TOKEN = 32.4e9  # Llama-3.1-8B, LoRA r=32, rows of 2,048; benchmarks/flops.py counts them
PEAKS = {  # dense bf16 TFLOP/s with float32 sums, from NVIDIA's data sheets
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 209, "L40S": 362, "A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989,
}  # fmt: skip


# ---- One variant, in a process of its own ----


def train(name: str, folder: Path, options) -> dict:
    import torch
    from transformers import set_seed

    sft, variant = sides.sft, VARIANTS[name]
    sft.load_libraries()
    if options.tiny:
        torch.set_num_threads(1)  # two threads that wait for each other cost more than the tiny model's work
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    fraction = 0.95
    if cuda:
        fraction *= min(1, options.cap * 2**30 / torch.cuda.get_device_properties(device).total_memory)
        torch.cuda.set_per_process_memory_fraction(fraction)
    args = sides.arguments(folder / "out", "--max-length", options.length, "--grad-accum", options.rows, "--optim",
                           options.optim, "--torch-memory-fraction", fraction, *variant.get("options", ()))  # fmt: skip
    rows = sides.random_rows(options.rows * options.steps, options.length, options.shape["vocab_size"])
    tokens = sum(len(ids) for i in range(len(rows)) for ids in rows[i]["input_ids"]) / options.steps
    set_seed(args.seed)
    start = time.monotonic()
    attention = "sdpa" if "peer" in variant else variant.get("attention") or sft.packed_attention()
    model = llama.nf4_llama(options.shape, device, attention)
    built = time.monotonic() - start
    set_seed(args.seed)
    if variant.get("peer") == "plain":
        trainer = sides.plain(args, model, rows)
    elif variant.get("peer") == "trl":
        trainer = sides.trl(args, model, rows, some_tokenizer(), checkpointing=True)
    else:
        trainer = sides.ours(args, model, rows, **({variant["without"]: False} if "without" in variant else {}))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    result = sides.timed(trainer, tokens, warm_up=min(2, options.steps - 1))
    layers = trainer.model.get_base_model().get_decoder().layers
    return result | {"built": built, "peak": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
                     "free": sum(not layer.gradient_checkpointing for layer in layers)}  # fmt: skip


def some_tokenizer():
    """SFTTrainer needs one; it is not used here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"-": 0}, "-"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="-", pad_token="-")


def card(*_) -> dict:
    """The device, and its measured speed of a bf16 matrix product."""
    import torch

    if not torch.cuda.is_available():
        return {"name": llama.machine(), "memory": None, "matmul": None}
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        a @ a
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        a @ a
    end.record()
    torch.cuda.synchronize()
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory": properties.total_memory / 2**30,
            "matmul": 10 * 2 * 8192**3 / start.elapsed_time(end) / 1e9}  # fmt: skip


def child(task, name: str, folder: str, options) -> None:
    """Run a task: its result or its error goes into result.json, its output into log."""
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        result = task(name, Path(folder), options)
    except Exception as error:
        traceback.print_exc()
        what = "out of memory" if "out of memory" in str(error) else f"{type(error).__name__}: {error}"
        result = {"error": what.split("\n")[0][:150]}
    Path(folder, "result.json").write_text(json.dumps(result))


# ---- All variants ----


def run(task, name: str, folder: Path, options, timeout: float) -> dict:
    """The result of a task in a new process, or an error if it ended without one or took too long.

    The process is spawned: bitsandbytes initialises CUDA on import, and a process forked after that could not use it.
    """
    if timeout < 5:
        return {"error": "skipped: no time left"}
    (folder / "result.json").unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(task, name, str(folder), options))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": "stopped: no time left"}
    if not (folder / "result.json").exists():
        return {"error": f"exit status {process.exitcode}"}
    return json.loads((folder / "result.json").read_text())


def line(name: str, result: dict, layers: int, peak: float | None, baseline: float | None) -> str:
    """A row of the printed table."""
    if "error" in result:
        return f"{name:<31}  {result['error']}"
    speed = result["tokens_per_second"]
    mfu = f"{speed * FLOP_PER_TOKEN / peak / 1e12:.1%}" if peak else "-"
    memory = f"{result['peak']:.1f}" if result["peak"] else "-"
    ratio = f"{speed / baseline:.2f}" if baseline else "-"
    losses = " ".join(f"{loss:.3f}" for loss in result["losses"][:3])
    return (f"{name:<31}{speed:>9,.0f}{ratio:>7}{mfu:>8}{memory:>10}{layers - result['free']:>7} of {layers:<4}"
            f"{result['built']:>5.0f} s  {losses}")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), metavar="NAME",
                        help=f"of: {', '.join(VARIANTS)}; all, but with --tiny not the compiled one")  # fmt: skip
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=4, help="rows in an optimizer step")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps; the first two are not timed")
    parser.add_argument(
        "--cap", type=float, default=24, help="GiB of the card that may be used, 95 %% of them by torch"
    )
    parser.add_argument("--optim", default="adamw_8bit", help="optimizer of every variant")
    parser.add_argument("--minutes", type=float, default=8.7, help="time for all; variants after that are left out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two short steps, also on a CPU")
    options = parser.parse_args(argv)
    options.shape = llama.LLAMA31_8B
    if options.tiny:
        options.shape, options.length, options.rows, options.steps = llama.LLAMA31_8B | TINY, 128, 2, 2
    # On a CPU, compiling would take most of the tiny run's time.
    options.variants = options.variants or [name for name in VARIANTS if not (options.tiny and "compiled" in name)]
    return options


def main() -> None:
    options = parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    # The same allocator for every side; each process reads this when it imports torch.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as name:
        folder = Path(name)
        device = run(card, "card", folder, options, 120)
        if "error" in device:
            sys.exit(device["error"])
        peak = next((tera for key, tera in PEAKS.items() if key in device["name"] and not options.tiny), None)
        print(f"device    {device['name']}" + (f", {device['memory']:.1f} GiB, capped at {min(options.cap, device['memory']):g}; "
              f"bf16 matmul {device['matmul']:.0f} TFLOP/s, MFU against {peak or '?'}" if device["memory"] else ""))  # fmt: skip
        print(f"versions  {llama.versions('torch', 'transformers', 'peft', 'bitsandbytes', 'trl')}")
        print(f"rows      {options.length:,} tokens, {options.rows} in a step, {options.steps} steps\n")
        print(
            f"{'':<31}{'tokens/s':>9}{'x TRL':>7}{'MFU':>8}{'peak GiB':>10}{'recomputed':>14}{'built':>6}  first losses"
        )
        baseline = None
        for variant in options.variants:
            result = run(train, variant, folder, options, deadline - time.monotonic())
            if variant == "TRL":
                baseline = result.get("tokens_per_second")
            print(line(variant, result, options.shape["num_hidden_layers"], peak, baseline), flush=True)
            if "error" in result and (folder / "log").exists():
                print((folder / "log").read_text()[-3000:], file=sys.stderr)
            (folder / "log").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
