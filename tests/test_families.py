"""Every family of bases: the merge is PEFT's, and llama.cpp answers like transformers; the loss: test_selfcheck.py.

The models are tiny and random, with the real configs (tests/families.py); weights are float32, on a CPU.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import (
    PROJECTIONS,
    answers_of_transformers,
    fingerprint,
    gap_at_first_difference,
    known_pre_tokenizer,
    llama_cpp,
    read_gguf,
)
from families import SPLITS, TOKENS, TRAINABLE, family
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from runs import TINY, arguments, assert_says, dialogues, error_of, record, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import merge_lora
import train_sft_dolores as sft

FUSED = {"o_proj", "down_proj", "qkv_proj", "gate_up_proj"}  # Phi's


def load(folder: Path, attention: str):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)


@pytest.fixture(scope="module", params=TRAINABLE)
def trained(request, tmp_path_factory) -> tuple[str, Path]:
    """(family, folder): out/ is an adapter trained in the base's own chat format, merged/ the merge of the two."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    (folder / "train.chatml").write_text(dialogues(40))
    targets = ("--lora-target-modules", "all-linear") if name.startswith("phi") else ()  # its layers have other names
    options = ("--chat-format", "base", *TINY, "--epochs", "1", *targets)
    code, printed = run(folder, "--model", family(name), "--output", "out", *options)
    assert code == 0, printed
    base, out, merged = (str(path) for path in (family(name), folder / "out", folder / "merged"))
    kind = TOKENS[name].kind
    with known_pre_tokenizer(kind) if kind in SPLITS else contextlib.nullcontext():
        merge_lora.main(["--adapter", out, "--base", base, "--output", merged, "--gguf", "BF16"])
    return name, folder


def test_train_and_merge(trained):
    name, folder = trained
    base, out, merged = family(name), folder / "out", folder / "merged"
    written = record(folder)
    assert written["results"]["steps"] >= 3 and written["base"]["fingerprint"] == fingerprint(base)
    assert written["data"]["system"] is None  # each of these dialogues has its own
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == (FUSED if name.startswith("phi") else set(PROJECTIONS))
    assert config["lora_alpha"] == 8 and type(config["lora_alpha"]) is int  # Ollama and vLLM refuse 8.0

    by_peft = PeftModel.from_pretrained(load(base, "eager"), out).merge_and_unload(safe_merge=True).state_dict()
    ours, before = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(by_peft[key], ours[key]) for key in ours)
    changed = {key.split(".")[-2] for key in ours if not torch.equal(before[key], ours[key])}
    assert changed == set(config["target_modules"])
    modelfile, card = (merged / "Modelfile").read_text(), ModelCard.load(merged / "README.md")
    assert f"PARAMETER num_ctx {4096 if name == 'phi3' else 8192}\n" in modelfile  # phi3 reads no more
    assert card.data.pipeline_tag == "text-generation" and ("Built with Llama" in card.text) == (name == "llama3")
    if name == "llama3":
        keys, tensors = read_gguf(merged / "dolores-v5-BF16.gguf")
        factors = tensors["rope_freqs.weight"].data  # the highest frequency is unchanged, the lowest divided by 8
        assert keys["llama.rope.freq_base"] == 500000.0 and factors[0] == 1.0 and factors[-1] == 8.0


CHATS = [
    [{"role": "user", "content": "Qui es-tu ?"}],
    [{"role": "user", "content": "l'été\n\n  12345 日本"}],
    [
        {"role": "user", "content": "Ça va ?"},
        {"role": "assistant", "content": "Oui, ça va."},
        {"role": "user", "content": "Et {{ toi }} 🙂 ?"},
    ],
    [{"role": "system", "content": "Tu es Dolores."}, {"role": "user", "content": "Un, deux"}],
]


@pytest.mark.slow
def test_llama_cpp_answers_like_transformers(trained, tmp_path):
    """Text, token ids and greedy answers of the GGUF that the merge has written."""
    name, folder = trained
    merged = Path(shutil.copytree(folder / "merged", tmp_path / "merged"))
    if name in ("mistral", "phi3"):  # llama.cpp has no sliding window for these two
        config = json.loads((merged / "config.json").read_text())
        (merged / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in CHATS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in CHATS]
    answers, rendered = llama_cpp(merged / "dolores-v5-BF16.gguf", prompts, CHATS, 24)
    bos = tokenizer.bos_token if TOKENS[name].adds_bos else ""
    assert [bos + text.removeprefix(bos) for text, _ in rendered] == texts
    assert [ids for _, ids in rendered] == prompts
    transformers_answers = answers_of_transformers(merged, prompts, 24)
    for prompt, ours, (theirs, reason) in zip(prompts, transformers_answers, answers, strict=True):
        # llama.cpp also ends at control tokens that generation_config.json does not list.
        equal = theirs == ours[: len(theirs)] and (len(theirs) == len(ours) or reason == "stop")
        # It rounds activations to bfloat16 too, which decides ties.
        assert equal or gap_at_first_difference(merged, prompt, ours, theirs) < 0.02


def test_the_folders_in_other_programs(trained):
    """As the README's table says: PEFT's auto class and a pipeline; vLLM is too large to install, it reads these keys."""
    _, folder = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    ids = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt").input_ids
    with torch.no_grad():
        live = AutoPeftModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)(input_ids=ids).logits
        assert torch.allclose(live, load(folder / "merged", "eager")(input_ids=ids).logits, atol=1e-4)
    generate = pipeline("text-generation", str(folder / "merged"), device="cpu", dtype=torch.float32)
    said = generate(CHATS[0], max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert said[:-1] == CHATS[0] and said[-1]["role"] == "assistant" and said[-1]["content"]

    config = json.loads((folder / "out/adapter_config.json").read_text())
    expected = {"r": 4, "bias": "none", "modules_to_save": None, "use_dora": False, "use_rslora": False}
    assert {key: config[key] for key in expected} == expected and isinstance(config["target_modules"], list)
    names = load_file(folder / "out/adapter_model.safetensors")
    pattern = r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+\.lora_[AB]\.weight"
    assert names and all(re.fullmatch(pattern, name) for name in names)


def test_the_command_that_uploads_the_merged_folder(tmp_path):
    """`hf upload` as in the README understands its arguments and stops at the network only."""
    (tmp_path / "merged").mkdir()
    command = [Path(sys.executable).with_name("hf"), "upload", "you/dolores-v5", "merged"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_none"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode and "offline" in done.stderr.lower() and "usage" not in done.stderr.lower(), done.stderr


@pytest.fixture
def error(tmp_path, monkeypatch):
    """The one line with which training and dry run refuse a base, before anything is written."""
    (tmp_path / "train.chatml").write_text(dialogues(4))
    monkeypatch.chdir(tmp_path)

    def refused(*options) -> str:
        lines = []
        for mode in ((), ("--dry-run",)):
            args = arguments("--output", "out", *options, *mode)
            lines.append(error_of(sft.dry_run if mode else sft.train, args, sft.World()))
        assert lines[0] == lines[1]
        return lines[0]

    return refused


@pytest.mark.parametrize(("name", "fact"), [("mixtral", "mixture of experts"), ("gpt2", "not built like a Llama")])
def test_what_cannot_be_merged_is_refused_at_once(name, fact, error):
    folder = family(name)
    assert_says(error("--model", folder), f"--model {folder}", fact)


def test_an_image_model_is_refused(tmp_path, error):
    folder = Path(shutil.copytree(family("gemma3"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    assert_says(error("--model", folder), f"--model {folder}", "images")


def test_files_with_other_names_are_refused(tmp_path):
    """transformers may load them all the same; the merge, tensor by tensor, could not."""
    sft.load_libraries()
    folder = str(family("llama3"))
    headers = sft.read_headers(folder, folder)
    sft.find_targets(folder, folder, headers, PROJECTIONS)
    name = "model.layers.1.mlp.up_proj.weight"
    lost = {key: value for key, value in headers.items() if key != name}
    assert_says(error_of(sft.find_targets, folder, folder, lost, PROJECTIONS), f"--model {folder}", name)
    other = {**headers, name: headers[name]._replace(shape=[160, 32])}
    assert_says(error_of(sft.find_targets, folder, folder, other, PROJECTIONS), f"--model {folder}", name, "[160, 32]")


@pytest.mark.parametrize("name", TRAINABLE)
def test_target_modules_of_each_family(name):
    sft.load_libraries()
    folder = str(family(name))
    linear, headers = sorted(FUSED if name.startswith("phi") else PROJECTIONS), sft.read_headers(folder, folder)

    def targets(given: str):
        return sft.find_targets(folder, folder, headers, [given])

    assert targets("all-linear") == linear and targets("o_proj") == ["o_proj"]
    for wrong in ("foo", "lm_head", "embed_tokens", "input_layernorm", *(set(PROJECTIONS) - set(linear))):
        assert_says(error_of(targets, wrong), f"--lora-target-modules {wrong}", *linear, "all-linear")
