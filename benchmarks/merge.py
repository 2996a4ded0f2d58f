#!/usr/bin/env python3
"""Time, memory and size of merge_lora.py, of a plain copy of the same shards, and of the usual PEFT snippet.

    python benchmarks/merge.py                       # Llama-3.1-8B's shape, 16 GB: needs 60 GB of disk in TMPDIR
    python benchmarks/merge.py --gguf Q8_0 Q4_K_M    # with a GGUF of these types
    python benchmarks/merge.py --layers 4            # a smaller model of the same width

The base holds random bf16 weights in shards as on the Hub, made on the spot and removed afterwards. Copy (`cp`) and merge, of the
safetensors alone, take turns, with the base to be read from the disk and with the base in the page cache (where it fits
into memory). Then each type of GGUF is written once, without safetensors, and the snippet runs once. Each run is a
process of its own, begins with an empty write queue and after a rest, and does not call fsync. Peak memory is the
kernel's figure for the process (VmHWM), read every 50 ms.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import llama

SHAPE = {name: llama.LLAMA31_8B[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                   "num_key_value_heads", "head_dim", "vocab_size")}  # fmt: skip
# Seconds. A virtual machine gives freed memory back to its host, and who touches it first pays several times the price:
# without a rest the side that starts faster after the other's files are deleted would find it still at hand.
REST = 15
MERGE = [sys.executable, llama.ROOT / "merge_lora.py"]
PEFT_SNIPPET = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def skeleton(base: Path):
    """The model without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))


def make_base(base: Path, layers: int) -> None:
    """tiny_llama31 with the real width: configuration, tokenizer, and shards of random bf16 numbers, as on the Hub."""
    import parts
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    shutil.copytree(parts.tiny_llama31(), base)
    (base / "model.safetensors").unlink()
    config = json.loads((base / "config.json").read_text()) | SHAPE | {"num_hidden_layers": layers}
    (base / "config.json").write_text(json.dumps(config))
    weights = skeleton(base).state_dict()
    split = split_torch_state_dict_into_shards(weights)
    pool = (torch.randn(1 << 26) * 0.02).bfloat16()  # drawing eight billion numbers would take minutes
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            shape = weights[name].shape
            tensors[name] = pool.repeat(-(-shape.numel() // len(pool)))[: shape.numel()].view(shape)
        save_file(tensors, base / file, {"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(base: Path, folder: Path) -> None:
    """A random LoRA adapter of rank 32 on all projections, as the trainer writes it."""
    import torch
    from engine import PROJECTIONS, complete_adapter
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import save_file

    folder.mkdir()
    config = LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = inject_adapter_in_model(config, skeleton(base), low_cpu_mem_usage=True)
    names = {name.replace(".default", ""): value.shape for name, value in model.named_parameters() if "lora_" in name}
    lora = {f"base_model.model.{name}": shape for name, shape in names.items()}
    save_file({name: torch.randn(shape) * 0.02 for name, shape in lora.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    complete_adapter(base, folder)


def measured(command: list, work: Path, cached: bool = False) -> tuple[float, float, float]:
    """(seconds, peak GiB, CPU seconds) of a child process that must succeed, the base in the page cache or not."""
    os.sync()
    for file in (work / "base").glob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cached and stream.read(1 << 24):
                pass
    time.sleep(REST)
    before = os.times()
    code, seconds, peak = llama.measured(command, work / "log")
    after = os.times()
    if code:
        sys.exit(f"{command[:3]} …: exit status {code}\n{(work / 'log').read_text()[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, peak, cpu


def available() -> int:
    """Bytes of main memory that can still be had."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def compare(work: Path, layers: int, rounds: int) -> None:
    """Copy and merge in turns, and their medians."""
    make_base(work / "base", layers)
    make_adapter(work / "base", work / "adapter")
    shards = list((work / "base").glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    commands = {
        "copy": ["cp", *shards, work / "copy"],
        "merge": [*MERGE, "--adapter", work / "adapter", "--output", work / "merge", "--gguf", "none"],
    }
    print(
        f"{'':<16}{'base':<10}{'seconds':>9}{'CPU s':>9}{'peak GiB':>10}{'size':>11}{'copy':>9}{'CPU s':>9}{'x copy':>8}"
    )
    for cached in (False, True):
        if cached and size > 0.8 * available():
            print("merge_lora.py   cached    left out: the base does not fit into the page cache")
            continue
        runs = {side: [] for side in commands}
        for _ in range(rounds):
            for side, command in commands.items():
                if side == "copy":
                    (work / side).mkdir()
                runs[side].append(measured(command, work, cached))
                shutil.rmtree(work / side)
        copy, merge = ([statistics.median(values) for values in zip(*found, strict=True)] for found in runs.values())
        print_line("merge_lora.py", merge, size, copy, "cached" if cached else "on disk")


def print_line(name: str, found, size: int, copy=None, state: str = "on disk") -> None:
    """A row of the table: what `measured` found, beside a copy's."""
    seconds, peak, cpu = found
    beside = f"{copy[0]:>9.1f}{copy[2]:>9.1f}{seconds / copy[0]:>8.2f}" if copy else ""
    print(f"{name:<16}{state:<10}{seconds:>9.1f}{cpu:>9.1f}{peak:>10.2f}{size / 1e9:>8.2f} GB{beside}", flush=True)


def ggufs(work: Path, kinds: list[str]) -> None:
    """Each type of GGUF from the base and the adapter of `compare`."""
    for kind in kinds:
        output = work / kind
        found = measured(
            [*MERGE, "--adapter", work / "adapter", "--output", output, "--gguf-only", "--gguf", kind], work
        )
        print_line(kind, found, next(output.glob("*.gguf")).stat().st_size)
        shutil.rmtree(output)


def peft(work: Path) -> None:
    """The usual snippet, where the memory at hand holds the model."""
    size = sum(shard.stat().st_size for shard in (work / "base").glob("*.safetensors"))
    if size > 0.75 * available() - 2 * 2**30:
        return print("PEFT snippet    left out: too little memory; try fewer --layers")
    command = [sys.executable, "-c", PEFT_SNIPPET, work / "base", work / "adapter", work / "peft"]
    print_line("PEFT snippet", measured(command, work), size)


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers; Llama-3.1-8B has 32")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of copy and merge")
    parser.add_argument("--gguf", nargs="*", default=["Q8_0"], help="types of GGUF to write")
    parser.add_argument("--no-peft", action="store_true", help="leave the PEFT snippet out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-") as folder:
        llama.print_machine("torch", "transformers", "peft")
        compare(Path(folder), args.layers, args.rounds)
        ggufs(Path(folder), args.gguf)
        if not args.no_peft:
            peft(Path(folder))


if __name__ == "__main__":
    main()
