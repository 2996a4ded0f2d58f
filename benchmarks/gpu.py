#!/usr/bin/env python3
"""Training speed and memory on a GPU: Llama-3.1-8B's shape in NF4 with LoRA, ours, TRL and the plain Trainer.

    python benchmarks/gpu.py                        # all variants, a 24 GiB cap, under ten minutes
    python benchmarks/gpu.py --variants ours TRL --steps 20
    python benchmarks/gpu.py --tiny                 # the same program with a tiny model, on a CPU

Nothing is downloaded: the weights are random and are quantized on the card, the token ids are random too, in rows
packed from documents as long as train.chatml's, two thirds of their tokens trained. Each variant is a process of its
own on the same rows in the same order; if it fails, its line shows the error. Ours is the trainer's own `load_model`:
its self-check, its measured choice of layers. Speed is the median over the steps after the first two; MFU counts
32.4 GFLOP a token, what forward and backward need without recomputation.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import llama
import sides

VARIANTS = {  # options of the trainer; None: a peer
    "TRL": None,
    "plain Trainer": None,
    "ours": (),
    "ours, dropout 0": ("--lora-dropout", 0),
    "ours, all layers recompute": ("--gradient-checkpointing", "all"),
    "ours, sdpa": (),
    "ours, 16 bits": ("--no-bnb-nf4",),
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}  # fmt: skip
FLOP_PER_TOKEN = 32.4e9  # Llama-3.1-8B, LoRA r=32, rows of 2,048; benchmarks/fake_cuda.py counts them
PEAKS = {  # dense bf16 TFLOP/s with float32 sums, from NVIDIA's data sheets
    "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 209, "L40S": 362, "A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989,
}  # fmt: skip


def train(name: str, folder: Path, options) -> dict:
    """One variant, in this process."""
    import torch
    from transformers import LlamaConfig, set_seed

    sft, cuda, ours = sides.sft, torch.cuda.is_available(), VARIANTS[name] is not None
    sft.load_libraries()
    device, fraction = torch.device("cuda", 0) if cuda else torch.device("cpu"), 0.95
    if cuda:
        fraction *= min(1, options.cap * 2**30 / torch.cuda.get_device_properties(device).total_memory)
        torch.cuda.set_per_process_memory_fraction(fraction)
    args = sides.arguments(folder / "out", "--model", folder, "--max-length", options.length, "--grad-accum", options.rows,
                           "--optim", options.optim, "--torch-memory-fraction", fraction, *(VARIANTS[name] or ()))  # fmt: skip
    shape = llama.LLAMA31_8B | (TINY if options.tiny else {})
    LlamaConfig(**shape).save_pretrained(folder)
    rows = sides.random_rows(options.rows * options.steps, options.length, shape["vocab_size"])
    tokens = sum(len(ids) for i in range(len(rows)) for ids in rows[i]["input_ids"]) / options.steps
    began = time.monotonic()
    set_seed(args.seed)
    choose = ours and "sdpa" not in name
    attention = sft.choose_attention(str(folder), device, bf16=True) if choose else "sdpa"
    model = sides.random_llama(shape, device, attention, nf4=args.bnb_nf4)
    set_seed(args.seed)
    if name == "TRL":
        trainer = sides.trl(args, model, rows, some_tokenizer(), checkpointing=True)
    elif name == "plain Trainer":
        trainer = sides.plain(args, model, rows)
    else:
        plan = sides.plan(args, rows, shape, trained=2 / 3)
        trainer = sides.ours(plan, model, device)
    built = time.monotonic() - began
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    result = sides.timed(trainer, tokens, warm_up=min(2, options.steps - 1)) | {"built": built}
    layers = trainer.model.get_base_model().get_decoder().layers
    result["recomputed"] = sum(layer.gradient_checkpointing for layer in layers)
    result["peak"] = torch.cuda.max_memory_reserved() / 2**30 if cuda else None
    if ours:
        result["planned"] = sum(sft.memory_plan(plan).values()) - 0.7  # the CUDA context is not torch's
        began = time.monotonic()
        sft.generate_answers(trainer.model, some_tokenizer(), {"": [1, 2, 3]})
        result["answer"] = time.monotonic() - began
    return result


def some_tokenizer():
    """SFTTrainer and the answers need one; what it says is not looked at."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"-": 0}, "-"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="-", pad_token="-")


def card(options) -> str:
    """The GPU's name; prints it and its measured speed of a bf16 matrix product."""
    import torch

    if not torch.cuda.is_available():
        return ""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _warm_up_and_timed in range(2):
        start.record()
        for _ in range(10):
            a @ a
        end.record()
        torch.cuda.synchronize()
    speed, properties = 10 * 2 * 8192**3 / start.elapsed_time(end) / 1e9, torch.cuda.get_device_properties(0)
    print(f"GPU       {properties.name}, {properties.total_memory / 2**30:.1f} GiB, of which {options.cap:g} are used; "
          f"bf16 matrix product {speed:.0f} TFLOP/s", flush=True)  # fmt: skip
    return properties.name


def line(name: str, result: dict, gpu: str, baseline: float | None) -> str:
    """A row of the printed table."""
    speed = result["tokens_per_second"]
    peak = next((tera for key, tera in PEAKS.items() if key in gpu), None)
    cells = [f"{speed:,.0f}", f"{speed / baseline:.2f}" if baseline else "-",
             f"{speed * FLOP_PER_TOKEN / peak / 1e12:.1%}" if peak else "-"]  # fmt: skip
    cells += [f"{result[key]:.1f}" if result.get(key) else "-" for key in ("peak", "planned", "answer", "built")]
    losses = " ".join(f"{loss:.3f}" for loss in result["losses"][:3])
    return f"{name:<27}" + "".join(f"{cell:>9}" for cell in cells) + f"{result['recomputed']:>11}  {losses}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--variants", nargs="+", choices=tuple(VARIANTS), metavar="NAME", default=list(VARIANTS), help="which to run")
    add("--length", type=int, default=2048, help="tokens in a row")
    add("--rows", type=int, default=4, help="rows in an optimizer step")
    add("--steps", type=int, default=8, help="optimizer steps; the first two are not timed")
    add("--cap", type=float, default=24, help="GiB of the card that may be used, 95 %% of them by torch")
    add("--optim", default="adamw_8bit", help="optimizer of every variant")
    add("--minutes", type=float, default=9.5, help="time for all; variants after that are left out")
    add("--tiny", action="store_true", help="a tiny model, two short steps, also on a CPU")
    add("--folder", type=Path, help=argparse.SUPPRESS)  # a variant in a process of its own
    options = parser.parse_args(argv)
    if options.tiny:
        options.length, options.rows, options.steps = 128, 2, 2
    return options


def main() -> None:
    options = parse_args()
    if options.folder:
        return print(json.dumps(train(options.variants[0], options.folder, options)))

    deadline, baseline = time.monotonic() + 60 * options.minutes, None
    llama.print_machine("torch", "transformers", "peft", "bitsandbytes", "trl")
    print(f"rows      {options.length:,} tokens, {options.rows} in a step, {options.steps} steps", flush=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # whose memory on the GPU ends with it
        gpu = pool.submit(card, options).result()
    heads = ("tokens/s", "x TRL", "MFU", "GiB", "planned", "answer s", "built s")
    print(f"\n{'':<27}" + "".join(f"{head:>9}" for head in heads) + " recomputed  first losses")
    for name in options.variants:
        with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
            command = [sys.executable, *sys.argv, "--variants", name, "--folder", folder]
            log, left = Path(folder, "log"), deadline - time.monotonic()
            allocator = "expandable_segments:True"  # the same for all
            code, _, _ = llama.measured(command, log, timeout=max(1, left), PYTORCH_ALLOC_CONF=allocator)
            text = re.sub(r"\n {11}", " ", log.read_text())  # what print_field wrapped
        if code:
            print(f"{name:<27}  exit status {code}: {(text.splitlines() or [''])[-1][:150]}", flush=True)
            print(text[-3000:], file=sys.stderr)
            continue
        result = json.loads(text.splitlines()[-1])
        baseline = result["tokens_per_second"] if name == "TRL" else baseline
        print(line(name, result, gpu, baseline), flush=True)
        for said in text.splitlines():
            if said.startswith(("checked", "memory")):
                print(f"  {said}")


if __name__ == "__main__":
    main()
