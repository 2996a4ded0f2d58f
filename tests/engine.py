"""Helpers for the export tests: an adapter folder as the trainer writes it, GGUF, llama.cpp."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import train_sft_dolores as trainer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fingerprint(base: Path) -> str:
    """What training records of a base's weights."""
    return trainer.fingerprint(trainer.read_headers(str(base), base))


def random_adapter(base: Path, folder: Path, format_name="dolores", dtype=None, seed=0) -> Path:
    """A folder as the trainer writes it, with PEFT's own files and random, non-zero LoRA weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=PROJECTIONS)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.02)
    if dtype:
        model.to(dtype)
    model.save_pretrained(folder)
    return complete_adapter(base, folder, format_name)


def complete_adapter(base: Path, folder: Path, format_name="dolores") -> Path:
    """Add the files that the trainer writes next to those of PEFT, and a checkpoint's folder."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, folder / name)
    encode = trainer.load_encoder(str(base), str(base), format_name)
    (folder / "chat_template.jinja").write_text(trainer.chat_template(encode.chat, bool(encode.start)))
    (folder / "checkpoint-10").mkdir()
    training = {
        "chat_format": {"name": format_name, **encode.chat._asdict()},
        "base": {"model": str(base), "revision": None, "fingerprint": fingerprint(base)},
    }
    (folder / "training_args.json").write_text(json.dumps(training))
    return folder


def known_pre_tokenizer(kind: str):
    """A context in which llama.cpp's converter takes a tokenizer for one of this kind.

    It tells pre-tokenizers by the ids of one text, and does not know those of a small vocabulary of ours.
    """
    from conversion.base import TextModel

    return mock.patch.object(TextModel, "get_vocab_base_pre", lambda self, tokenizer: kind)


def to_gguf(model: Path, gguf: Path, outtype: str) -> Path:
    """Run llama.cpp's converter as it comes, in a process of its own."""
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(model), "--outfile", str(gguf), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and gguf.is_file(), done.stderr[-3000:]
    return gguf


def read_gguf(file: Path) -> tuple[dict, dict]:
    """The keys of a GGUF and its tensors, by name."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def answers_of_transformers(model: Path, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy token ids in float32 arithmetic on bfloat16 weights, up to and with the end token."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).float()
    network.generation_config.temperature = network.generation_config.top_p = None  # unused; set, they cause a warning
    # One thread, here and in llama.cpp: on a busy machine, two that wait for each other are ten times slower.
    threads, answers = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
        answers.append(made[0, len(prompt) :].tolist())
    torch.set_num_threads(threads)
    return answers


def gap_at_first_difference(folder: Path, prompt: list[int], mine: list[int], its: list[int]) -> float:
    """Difference in log probability (nats) of the two tokens where two greedy answers first differ."""
    import torch
    from transformers import AutoModelForCausalLM

    at = next(i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + mine[:at]])).logits[0, -1]
    return float(logits[mine[at]] - logits[its[at]])


LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
gguf, prompts, chats, max_new_tokens = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = gguf, 2048, 1, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)

def ask(path, **content):
    request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))

answers, rendered = [], []
for prompt in prompts:
    request = {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    answer = ask("/completion", **request)
    answers.append([answer["tokens"], "length" if answer["stop_type"] == "limit" else "stop"])
for chat in chats:
    text = ask("/apply-template", messages=chat)["prompt"]
    rendered.append([text, ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]])
print("ANSWERS" + json.dumps([answers, rendered]), flush=True)
"""


def llama_cpp(gguf: Path, prompts: list[list[int]], chats: list[list[dict]], max_new_tokens: int) -> tuple[list, list]:
    """llama.cpp's answers to prompts: (greedy token ids, "stop" or "length"), and chats as it renders them: (text, ids).

    In a process of its own, because it prints to stdout.
    """
    question = json.dumps([str(gguf), prompts, chats, max_new_tokens])
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP], input=question, capture_output=True, text=True)
    assert "ANSWERS" in done.stdout, done.stderr[-3000:]
    answers, rendered = json.loads(done.stdout.split("ANSWERS")[1])
    return [tuple(answer) for answer in answers], rendered
