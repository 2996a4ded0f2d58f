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
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import llama
import parts
from learning import exchanges

import merge_lora
import train_sft_dolores as sft

ROWS = 256  # tokens, more than any of these exchanges has
KINDS = {"BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15}  # llama.h's numbers
QUANTISER = "muthuishere-modelnexus==0.2.1"  # a wheel with a whole libllama.so; xllamacpp has no quantiser in it
LLAMA_CPP_LOSS = """
import ctypes as c, glob, json, sys
import numpy as np, xllamacpp
gguf, samples, size = json.load(sys.stdin)
lib = c.CDLL(glob.glob(xllamacpp.__path__[0] + "/*.so")[0])  # llama.h's functions, at the version that is tested

def struct(*fields):  # more room than any version of llama.h needs; only the first fields are touched
    return type("struct", (c.Structure,), {"_fields_": [*fields, ("rest", c.c_char * 1000)]})

def function(name, result, *arguments):
    found = getattr(lib, name)
    found.restype, found.argtypes = result, arguments
    return found

Model, Context = struct(), struct(*((n, c.c_uint32) for n in ("n_ctx", "n_batch", "n_ubatch")))
ints = c.POINTER(c.c_int32)
class Batch(c.Structure):
    _fields_ = [("n_tokens", c.c_int32), ("token", ints), ("embd", c.c_void_p), ("pos", ints), ("n_seq_id", ints),
                ("seq_id", c.POINTER(ints)), ("logits", c.POINTER(c.c_int8))]

function("llama_backend_init", None)()
Log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
quiet = Log(lambda *_: None)
function("llama_log_set", None, Log, c.c_void_p)(quiet, None)
load = function("llama_model_load_from_file", c.c_void_p, c.c_char_p, Model)
model = load(gguf.encode(), function("llama_model_default_params", Model)())
params = function("llama_context_default_params", Context)()
params.n_ctx = params.n_batch = params.n_ubatch = size
context = function("llama_init_from_model", c.c_void_p, c.c_void_p, Context)(model, params)
function("llama_set_n_threads", None, c.c_void_p, c.c_int32, c.c_int32)(context, 1, 1)
memory = function("llama_get_memory", c.c_void_p, c.c_void_p)(context)
clear = function("llama_memory_clear", None, c.c_void_p, c.c_bool)
batch = function("llama_batch_init", Batch, c.c_int32, c.c_int32, c.c_int32)(size, 0, 1)
decode = function("llama_decode", c.c_int32, c.c_void_p, Batch)
logits_at = function("llama_get_logits_ith", c.POINTER(c.c_float), c.c_void_p, c.c_int32)
total = count = 0
for ids, labels, vocabulary in samples:
    clear(memory, True)
    batch.n_tokens, targets = len(ids), [*labels[1:], -100]
    for i, (token, target) in enumerate(zip(ids, targets)):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
        batch.logits[i] = target != -100
    assert decode(context, batch) == 0
    for i, target in enumerate(targets):
        if target != -100:
            logits = np.ctypeslib.as_array(logits_at(context, i), (vocabulary,)).astype(np.float64)
            total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
            count += 1
print("LOSS" + str(total / count))
"""


def loss_of_llama_cpp(gguf: Path, samples, vocabulary: int) -> float:
    """Mean loss in nats over the trained tokens, as llama.cpp computes it from this GGUF file in a process of its own."""
    question = json.dumps([str(gguf), [(s.input_ids.tolist(), s.labels.tolist(), vocabulary) for s in samples], ROWS])
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP_LOSS], input=question, capture_output=True, text=True)
    assert "LOSS" in done.stdout, done.stderr[-3000:]
    return float(done.stdout.split("LOSS")[1])


def loss_of_transformers(folder: Path, samples) -> float:
    """The same by transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model, total, count = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0, 0
    for sample in samples:
        ids, labels = (torch.from_numpy(x.astype("int64"))[None] for x in sample)
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * int((labels[0, 1:] != -100).sum())
        count += int((labels[0, 1:] != -100).sum())
    return total / count


def quantise(bf16: Path, gguf: Path, kind: int) -> Path:
    """llama.cpp's llama_model_quantize."""

    def unpack(partial: Path):
        with parts.fetch(QUANTISER) as wheel:
            wheel.extractall(partial)

    class Params(ctypes.Structure):  # the first fields of llama_model_quantize_params, and room for the rest
        _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_char * 1000)]

    folder = parts.made_once(parts.CACHE / QUANTISER.replace("==", "-"), unpack)
    lib = ctypes.CDLL(str(next(folder.glob("modelnexus/native/*/libllama.so"))))
    lib.llama_model_quantize_default_params.restype = Params
    params = lib.llama_model_quantize_default_params()
    params.ftype = kind
    lib.llama_backend_init()
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    lib.llama_log_set(quiet, None)
    assert lib.llama_model_quantize(str(bf16).encode(), str(gguf).encode(), ctypes.byref(params)) == 0
    return gguf


def equal_tensors(a: Path, b: Path) -> str:
    """How many tensors of two GGUF files have the same type and bytes, as `272 of 272`."""
    from gguf import GGUFReader

    one, other = ({t.name: (t.tensor_type, t.data) for t in GGUFReader(file).tensors} for file in (a, b))
    same = sum(kind == other[name][0] and bool((data == other[name][1]).all()) for name, (kind, data) in one.items())
    return f"{same} of {len(one)}"


def train(folder: Path, base: Path, dialogues: int) -> tuple[Path, list]:
    """(adapter, held-out samples)."""
    held_out, rest = exchanges()
    for name, chats in (("train", rest[:dialogues]), ("held_out", held_out[:dialogues])):
        lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    command = [sys.executable, llama.ROOT / "train_sft_dolores.py", "--model", base, "--output", folder / "adapter",
               "--train-files", folder / "train.jsonl", "--eval-fraction", 0, "--no-bnb-nf4", "--no-bf16", "--optim", "adamw_torch",
               "--sample-prompts", "none", "--max-length", ROWS, "--grad-accum", 1, "--learning-rate", 4.5e-4,
               "--epochs", 3]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    encode = sft.load_encoder(str(base), str(base), "dolores")
    conversations = sft.read_conversations([str(folder / "held_out.jsonl")], "messages")
    return folder / "adapter", encode([conversation.turns for conversation in conversations])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", nargs="+", default=list(KINDS), choices=KINDS, help="types, BF16 among them")
    parser.add_argument("--dialogues", type=int, default=200, help="to train on (default: %(default)s)")
    parser.add_argument("--base", type=Path, help="model folder (default: SmolLM2-135M)")
    args = parser.parse_args()
    print("machine", llama.machine(), llama.versions("torch", "transformers", "peft"))
    from engine import to_gguf

    base = args.base or parts.smollm2()
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="export-benchmark-") as work:
        adapter, samples = train(Path(work), base, args.dialogues)
        folders = {kind: Path(work) / kind for kind in args.gguf}
        for kind, folder in folders.items():
            merge_lora.main(["--adapter", str(adapter), "--output", str(folder), "--name", "export", "--gguf", kind])
        ours = {kind: folder / f"export-{kind}.gguf" for kind, folder in folders.items()}
        merged = folders["BF16"]
        print(f"\n{'held-out loss':<28}{'ours':>9}{'llama.cpp tools':>17}{'equal tensors':>16}{'size':>10}")
        print(f"{'base, transformers':<28}{loss_of_transformers(base, samples):>9.4f}")
        print(f"{'merged, transformers':<28}{loss_of_transformers(merged, samples):>9.4f}")
        for kind, file in ours.items():
            theirs = Path(work) / f"llama.cpp-{kind}.gguf"
            by_converter = kind in ("BF16", "Q8_0")
            to_gguf(merged, theirs, kind.lower()) if by_converter else quantise(ours["BF16"], theirs, KINDS[kind])
            found = [loss_of_llama_cpp(gguf, samples, vocabulary) for gguf in (file, theirs)]
            size = f"{file.stat().st_size / 1e6:.0f} MB"
            print(f"{kind:<28}{found[0]:>9.4f}{found[1]:>17.4f}{equal_tensors(file, theirs):>16}{size:>10}", flush=True)


if __name__ == "__main__":
    main()
