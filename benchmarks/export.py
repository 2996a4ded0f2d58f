#!/usr/bin/env python3
"""What is left of the training after merging and quantising: held-out loss and answers, SmolLM2-135M, in llama.cpp.

    python benchmarks/export.py

An adapter is trained on NF4 weights and merged; merge_lora.py writes the GGUF in each type. Beside it stand files of
llama.cpp's own tools: its converter (BF16, Q8_0) and its quantiser (K-quants, from BF16). Loss is the mean over the trained
tokens of 22 held-out conversations: by transformers in float32, and by llama.cpp itself from its logits. Then 20
questions: greedy answers of llama.cpp compared with those of transformers.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import llama
from learning import QUESTIONS, difference, held_out, losses, row, split, table, train

import merge_lora
import train_sft_dolores as trainer

ROWS = 1024  # tokens, the trainer's --max-length in learning.KNOBS
KINDS = {"BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15}  # llama.h's numbers
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


def live(base: Path, adapter: Path):
    """Base in NF4 as the trainer loads it, with the adapter, in float32 arithmetic."""
    from peft import PeftModel

    args = argparse.Namespace(bf16=False, bnb_nf4=True, bnb_dtype="float32")
    model = trainer.load_base(args, str(base), "cpu")
    return PeftModel.from_pretrained(model, adapter).eval()


def quantise(bf16: Path, gguf: Path, kind: int) -> Path:
    """llama.cpp's llama_model_quantize."""
    from parts import CACHE, fetch, made_once

    def unpack(partial: Path):
        with fetch(QUANTISER) as wheel:
            wheel.extractall(partial)

    class Params(ctypes.Structure):  # the first fields of llama_model_quantize_params, and room for the rest
        _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_char * 1000)]

    folder = made_once(CACHE / QUANTISER.replace("==", "-"), unpack)
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


def compare_answers(merged: Path, ggufs: dict[str, Path], longest: int) -> None:
    """Greedy answers of llama.cpp and of transformers': how many are equal, where the others part, how many end."""
    import torch
    from engine import answers_of_llama_cpp, answers_of_transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in chats]
    ours = answers_of_transformers(merged, prompts, longest)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    table("answers", "equal", "tokens before they part, median", "gap there in nats, median and largest", "end by themselves")  # fmt: skip
    ended = sum(ids[-1] == tokenizer.eos_token_id for ids in ours)
    row("transformers, float32", "", "", "", f"{ended} of {len(ours)}")
    for name, gguf in ggufs.items():
        theirs = answers_of_llama_cpp(gguf, prompts, longest)
        places, gaps = [], []
        for prompt, mine, (its, _) in zip(prompts, ours, theirs, strict=True):
            if mine != its:
                at = next(i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b)
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + mine[:at]])).logits[0, -1]
                places.append(at)
                gaps.append(float(logits[mine[at]] - logits[its[at]]))
        middle = [sorted(values)[len(values) // 2] if values else "" for values in (places, gaps)]
        gap = f"{middle[1]:.3f}, {max(gaps):.3f}" if gaps else ""
        ended = sum(reason == "stop" for _, reason in theirs)
        row(f"llama.cpp {name}", f"{len(ours) - len(places)} of {len(ours)}", middle[0], gap, f"{ended} of {len(ours)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--epochs", default="0.3", help="passes over the corpus; steps of one row (default: %(default)s)"
    )
    parser.add_argument("--answer", type=int, default=100, help="tokens at most per answer (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs_export"), help="where to work; finished parts stay")
    args = parser.parse_args()
    print("machine", llama.machine(), llama.versions("torch", "transformers", "peft"))
    trainer.load_libraries()
    import torch
    from engine import to_gguf
    from parts import smollm2
    from transformers import AutoConfig, AutoModelForCausalLM

    files, adapter = split(args.folder), args.folder / "adapter"
    settings = ["--bf16", "--bnb-nf4", "--grad-accum", "1", "--eval-steps", "35", "--save-steps", "35"]
    record = train(adapter, files, "whole", *settings, "--epochs", args.epochs)
    results = record["results"]
    print(f"trained {results['steps']} steps; the adapter is from step {results['best_step']}")
    print(
        f"the trainer's own loss on NF4, bfloat16: {results['eval_loss_before']:.3f} -> {results['eval_loss_after']:.3f}"
    )
    samples = held_out(files["held_out"], "dolores")
    vocabulary = AutoConfig.from_pretrained(smollm2()).vocab_size

    merged, ours = args.folder / "merged", {}
    for kind in KINDS:
        output = args.folder / f"gguf-{kind}" if ours else merged
        if not output.exists():
            more = ["--gguf-only"] if ours else []
            merge_lora.main(
                ["--adapter", str(adapter), "--output", str(output), "--name", "export", "--gguf", kind, *more]
            )
        ours[kind] = output / f"export-{kind}.gguf"
    table("held-out loss", "size", "merge_lora.py's file", "llama.cpp's tools' file", "equal tensors")
    mean = lambda sums: float(sums[:, 0].sum() / sums[:, 1].sum())  # noqa: E731
    live_loss = losses(live(smollm2(), adapter), samples)
    row("adapter live on NF4, as trained", "", mean(live_loss), "", "")
    merged_loss = losses(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), samples)
    row("merged, transformers, float32", "", mean(merged_loss), "", "")
    for kind, file in ours.items():
        theirs = args.folder / f"llama.cpp-{kind}.gguf"
        if not theirs.exists():
            by_converter = kind in ("BF16", "Q8_0")
            to_gguf(merged, theirs, kind.lower()) if by_converter else quantise(ours["BF16"], theirs, KINDS[kind])
        found = [loss_of_llama_cpp(gguf, samples, vocabulary) for gguf in (file, theirs)]
        row(kind, f"{file.stat().st_size / 1e6:.0f} MB", *found, equal_tensors(file, theirs))
    print(f"\nlive - merged: {difference(live_loss, merged_loss)}")
    compare_answers(merged, ours, args.answer)


if __name__ == "__main__":
    main()
