#!/usr/bin/env python3
"""What is left of the training after merging and quantising: held-out loss of each type of GGUF, in llama.cpp.

    python benchmarks/export.py                    # SmolLM2-135M on a CPU: some minutes
    python benchmarks/export.py --gguf BF16 Q8_0   # only these types

An adapter is trained on 200 single exchanges between people and merged; merge_lora.py writes the GGUF in each type. Beside
it stand files of llama.cpp's own tools: its converter (BF16, Q8_0) and its quantiser (K-quants, from BF16). Loss is the mean
over the trained tokens of 100 held-out exchanges: by transformers in float32, and by llama.cpp itself from its logits.
"""

import argparse
import ctypes
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import llama
import numpy as np
import parts
from learning import exchanges

import train_sft_dolores as sft

ROWS = 256  # tokens, more than any of these exchanges has
KINDS = {"BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15}  # llama.h's numbers
WHEEL = "muthuishere-modelnexus==0.2.1"  # with a whole libllama.so; xllamacpp has no quantiser in it


# ---- llama.h, as far as it is called here ----


class Pointer(ctypes.c_void_p):
    """To a model, a context or its memory; ctypes would pass on 32 bits of a plain one."""


class Parameters(ctypes.Structure):
    """The first fields (of a context: n_ctx, n_batch, n_ubatch; of the quantiser: threads, type), and room for the rest."""

    _fields_ = [("numbers", ctypes.c_int32 * 3), ("rest", ctypes.c_char * 1000)]


class Batch(ctypes.Structure):
    """The tokens of one call."""

    ints = ctypes.POINTER(ctypes.c_int32)
    _fields_ = [("n_tokens", ctypes.c_int32), ("token", ints), ("embd", Pointer), ("pos", ints), ("n_seq_id", ints),
                ("seq_id", ctypes.POINTER(ints)), ("logits", ctypes.POINTER(ctypes.c_int8))]  # fmt: skip


RETURNS = {
    **{f"llama_{kind}_default_params": Parameters for kind in ("model", "context", "model_quantize")},
    **dict.fromkeys(("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"), Pointer),
    "llama_batch_init": Batch,
    "llama_get_logits_ith": ctypes.POINTER(ctypes.c_float),
}
ignore_log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


@functools.cache
def llama_cpp() -> ctypes.CDLL:
    """llama.cpp's library. merge_lora.py runs in a process of its own: two copies of ggml in one are taken for the same."""

    def unpack(partial: Path):
        with parts.fetch(WHEEL) as wheel:
            wheel.extractall(partial)

    folder = parts.made_once(parts.CACHE / WHEEL.replace("==", "-"), unpack)
    file = next(folder.glob("modelnexus/native/*/libllama.so"))
    lib = ctypes.CDLL(str(file))
    for name, result in RETURNS.items():
        getattr(lib, name).restype = result
    lib.llama_log_set(ignore_log, None)
    ctypes.CDLL(str(file.with_name("libggml.so.0"))).ggml_backend_load_all_from_path(str(file.parent).encode())
    return lib


def loss_of_llama_cpp(gguf: Path, samples, vocabulary: int) -> float:
    """Mean loss in nats over the trained tokens, from llama.cpp's logits for this GGUF file."""
    import torch

    lib = llama_cpp()
    parameters = lib.llama_context_default_params()
    parameters.numbers[:] = [ROWS] * 3
    model = lib.llama_model_load_from_file(str(gguf).encode(), lib.llama_model_default_params())
    context = lib.llama_init_from_model(model, parameters)
    lib.llama_set_n_threads(context, 1, 1)
    batch, losses = lib.llama_batch_init(ROWS, 0, 1), []
    for sample in samples:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens, targets = len(sample.input_ids), [*sample.labels[1:].tolist(), sft.IGNORE]
        for i, token in enumerate(sample.input_ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = targets[i] != sft.IGNORE
        assert lib.llama_decode(context, batch) == 0
        for i, target in enumerate(targets):
            if target != sft.IGNORE:
                logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (vocabulary,))
                losses.append(-float(torch.from_numpy(logits).log_softmax(0)[target]))
    return statistics.mean(losses)


def quantise(bf16: Path, gguf: Path, kind: str) -> None:
    """llama.cpp's llama_model_quantize."""
    lib = llama_cpp()
    parameters = lib.llama_model_quantize_default_params()
    parameters.numbers[1] = KINDS[kind]
    assert lib.llama_model_quantize(str(bf16).encode(), str(gguf).encode(), ctypes.byref(parameters)) == 0


# ---- The comparison ----


def loss_of_transformers(folder: Path, samples) -> float:
    """The same by transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for sample in samples:
        ids, labels = (torch.from_numpy(x.astype("int64")) for x in sample)
        with torch.no_grad():
            found = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="none")
        losses += found[labels[1:] != sft.IGNORE].tolist()
    return statistics.mean(losses)


def equal_tensors(a: Path, b: Path) -> str:
    """How many tensors of two GGUF files have the same type and bytes, as `272 of 272`."""
    from gguf import GGUFReader

    one, other = ({t.name: (t.tensor_type, t.data) for t in GGUFReader(file).tensors} for file in (a, b))
    same = sum(kind == other[name][0] and bool((data == other[name][1]).all()) for name, (kind, data) in one.items())
    return f"{same} of {len(one)}"


def run(script: str, *options) -> None:
    """One of the two scripts, in a process of its own."""
    command = [sys.executable, llama.ROOT / script, *options]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def train(folder: Path, base: Path, dialogues: int) -> tuple[Path, list]:
    """(adapter, held-out samples)."""
    held_out, rest = exchanges()
    for name, chats in (("train", rest[:dialogues]), ("held_out", held_out[:dialogues])):
        lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    run("train_sft_dolores.py", "--model", base, "--output", folder / "adapter", "--train-files", folder / "train.jsonl",
        "--eval-fraction", 0, "--no-bnb-nf4", "--no-bf16", "--optim", "adamw_torch", "--sample-prompts", "none",
        "--max-length", ROWS, "--grad-accum", 1, "--learning-rate", 4.5e-4, "--epochs", 3)  # fmt: skip
    encode = sft.load_encoder(str(base), str(base), "dolores")
    conversations = sft.read_conversations([str(folder / "held_out.jsonl")], "messages")
    return folder / "adapter", encode([conversation.turns for conversation in conversations])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", nargs="+", default=list(KINDS), choices=KINDS, help="types, BF16 first")
    parser.add_argument("--dialogues", type=int, default=200, help="to train on (default: %(default)s)")
    parser.add_argument("--base", type=Path, help="model folder (default: SmolLM2-135M)")
    args = parser.parse_args()
    llama.print_machine("torch", "transformers", "peft")
    from engine import to_gguf

    base = args.base or parts.smollm2()
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="export-benchmark-") as name:
        work = Path(name)
        adapter, samples = train(work, base, args.dialogues)
        print(f"\n{'held-out loss':<28}{'ours':>9}{'llama.cpp tools':>17}{'equal tensors':>16}{'size':>10}")
        print(f"{'base, transformers':<28}{loss_of_transformers(base, samples):>9.4f}", flush=True)
        for kind in args.gguf:
            run("merge_lora.py", "--adapter", adapter, "--output", work / kind, "--name", "export", "--gguf", kind)
            ours, theirs = work / kind / f"export-{kind}.gguf", work / f"{kind}.gguf"
            if kind == "BF16":
                print(f"{'merged, transformers':<28}{loss_of_transformers(work / kind, samples):>9.4f}")
            if kind in ("BF16", "Q8_0"):
                to_gguf(work / kind, theirs, kind.lower())
            else:
                quantise(work / "BF16" / "export-BF16.gguf", theirs, kind)
            found = [loss_of_llama_cpp(gguf, samples, vocabulary) for gguf in (ours, theirs)]
            size = f"{ours.stat().st_size / 1e6:.0f} MB"
            print(f"{kind:<28}{found[0]:>9.4f}{found[1]:>17.4f}{equal_tensors(ours, theirs):>16}{size:>10}", flush=True)


if __name__ == "__main__":
    main()
