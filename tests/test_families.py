"""Every family of bases: the loss is transformers' own, training can be resumed, the merge is PEFT's.

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

import numpy as np
import pytest
import torch
from engine import answers_of_transformers, fingerprint, gap_at_first_difference, known_pre_tokenizer, llama_cpp
from families import REFUSED, SPLITS, TOKENS, TRAINABLE, family
from runs import TINY, arguments, assert_same_adapter, assert_says, dialogues, error_of, run
from safetensors.torch import load_file
from transformers import AutoTokenizer

import merge_lora
import train_sft_dolores as sft

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {"o_proj", "down_proj", "qkv_proj", "gate_up_proj"}  # Phi's
DATA = "".join(
    f"<|user|>\n{'Qui es-tu, dis-moi ? ' * n}\n<|assistant|>\n{'Je suis Dolores. ' * n}\n<|endoftext|>\n"
    for n in (2, 4, 5)
)


def load(folder: Path, attention: str, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32, **options)


@pytest.mark.parametrize("name", TRAINABLE)
def test_loss_and_gradients_are_those_of_transformers(name, tmp_path):
    """Packed documents longer than the sliding window, against each alone with transformers' eager attention and loss."""
    sft.load_libraries()
    folder = family(name)
    (tmp_path / "d.chatml").write_text(DATA)
    encode = sft.load_encoder(str(folder), str(folder), "dolores")
    samples = encode([c.turns for c in sft.read_conversations([str(tmp_path / "d.chatml")], "chatml")])
    assert min(len(sample.input_ids) for sample in samples) > 24  # the window of families.py

    eager = load(folder, "eager")
    expected = torch.zeros(())
    for ids, labels in samples:
        ids, labels = (torch.from_numpy(x.astype(np.int64))[None] for x in (ids, labels))
        logits = eager(input_ids=ids, use_cache=False).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    expected.backward()

    packed = load(folder, sft.choose_attention(str(folder), torch.device("cpu"), False))
    row = {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples],
           "file": [""] * len(samples), "line": [0] * len(samples)}  # fmt: skip
    batch = sft.collate([row])
    del batch["documents"]
    loss = packed(**batch, use_cache=False, num_items_in_batch=1).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    head = packed.get_output_embeddings().weight  # frozen in training: its gradient is not computed
    theirs = dict(eager.named_parameters())
    for parameter, value in packed.named_parameters():
        if value is not head:
            difference = (value.grad - theirs[parameter].grad).norm() / theirs[parameter].grad.norm()
            assert difference < 1e-4, parameter


@pytest.fixture(scope="module", params=TRAINABLE)
def trained(request, tmp_path_factory) -> tuple[str, Path]:
    """(family, folder): out/ is an adapter trained in the base's own chat format, merged/ the merge of the two."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "train.chatml").write_text(dialogues(40))
    code, printed = run(folder, *options_of(request.param))
    assert code == 0, printed
    base, out, merged = (str(path) for path in (family(request.param), folder / "out", folder / "merged"))
    kind = TOKENS[request.param].kind
    with known_pre_tokenizer(kind) if kind in SPLITS else contextlib.nullcontext():
        merge_lora.main(["--adapter", out, "--base", base, "--output", merged, "--gguf", "BF16"])
    return request.param, folder


def options_of(name: str) -> tuple:
    targets = ("--lora-target-modules", "all-linear") if name.startswith("phi") else ()  # its layers have other names
    return ("--model", family(name), "--output", "out", "--chat-format", "base", *TINY, "--epochs", "1", *targets)


def test_train_resume_and_merge(trained, tmp_path):
    name, folder = trained
    base, out = family(name), tmp_path / "out"
    shutil.copytree(folder / "out", out)
    shutil.copy(folder / "train.chatml", tmp_path)
    record = json.loads((out / "training_args.json").read_text())
    assert record["results"]["steps"] >= 3 and record["base"]["fingerprint"] == fingerprint(base)
    assert record["data"]["system"] is None  # each of these dialogues has its own
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == (FUSED if name.startswith("phi") else set(SEVEN))
    assert config["lora_alpha"] == 8 and type(config["lora_alpha"]) is int  # Ollama and vLLM refuse 8.0

    last = max(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.rmtree(last)
    code, printed = run(tmp_path, *options_of(name), "--resume")
    assert code == 0, printed
    assert_same_adapter(out, folder / "out")

    from peft import PeftModel

    by_peft = PeftModel.from_pretrained(load(base, "eager"), out).merge_and_unload(safe_merge=True).state_dict()
    merged, before = load_file(folder / "merged/model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(by_peft[key], merged[key]) for key in merged)
    changed = {key.split(".")[-2] for key in merged if not torch.equal(before[key], merged[key])}
    assert changed == set(config["target_modules"])


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
    for prompt, ours, (theirs, reason) in zip(
        prompts, answers_of_transformers(merged, prompts, 24), answers, strict=True
    ):
        # llama.cpp also ends at control tokens that generation_config.json does not list.
        equal = theirs == ours[: len(theirs)] and (len(theirs) == len(ours) or reason == "stop")
        # It rounds activations to bfloat16 too, which decides ties.
        assert equal or gap_at_first_difference(merged, prompt, ours, theirs) < 0.02


def test_the_adapter_folder_in_other_programs(trained):
    """As the README's table says: PEFT's auto class and a pipeline; vLLM is too large to install, it reads these keys."""
    from peft import AutoPeftModelForCausalLM
    from transformers import pipeline

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
    expected = {
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    assert {key: config[key] for key in expected} == expected and isinstance(config["target_modules"], list)
    names = load_file(folder / "out/adapter_model.safetensors")
    pattern = r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+\.lora_[AB]\.weight"
    assert names and all(re.fullmatch(pattern, name) for name in names)


def test_the_hub_takes_the_merged_folder(trained):
    """`hf upload` as in the README understands its arguments and stops at the network only; the card can be read."""
    from huggingface_hub import ModelCard

    name, folder = trained
    for path in (folder / "merged", folder / "out"):
        assert ModelCard.load(path / "README.md").data.pipeline_tag == "text-generation"
    if name == TRAINABLE[0]:
        command = [Path(sys.executable).with_name("hf"), "upload", "you/dolores-v5", "merged"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_none"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
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


@pytest.mark.parametrize(
    ("name", "fact"), [*zip(REFUSED, ("mixture of experts", "not built like a Llama"), strict=True)]
)
def test_what_cannot_be_merged_is_refused_at_once(name, fact, error):
    folder = family(name)
    assert_says(error("--model", folder), f"--model {folder}", fact)


def test_an_adapter_or_an_image_model_is_refused(tmp_path, error):
    folder = tmp_path / "copy"
    shutil.copytree(family("gemma3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    assert_says(error("--model", folder), f"--model {folder}", "images")
    (folder / "adapter_config.json").write_text("{}")
    assert_says(error("--model", folder), f"--model {folder}", "adapter", "--init-adapter")


def test_files_with_other_names_are_refused(tmp_path):
    """transformers may load them all the same; the merge, tensor by tensor, could not."""
    sft.load_libraries()
    folder = str(family("llama3"))
    headers = sft.read_headers(folder, folder)
    sft.check_weights(folder, folder, headers, SEVEN)
    name = "model.layers.1.mlp.up_proj.weight"
    lost = {key: value for key, value in headers.items() if key != name}
    assert_says(error_of(sft.check_weights, folder, folder, lost, SEVEN), f"--model {folder}", name)
    other = {**headers, name: headers[name]._replace(shape=[160, 32])}
    assert_says(error_of(sft.check_weights, folder, folder, other, SEVEN), f"--model {folder}", name, "[160, 32]")


def test_target_modules_of_each_family():
    sft.load_libraries()
    for name in TRAINABLE:
        folder = str(family(name))
        linear = sorted(FUSED if name.startswith("phi") else SEVEN)

        def targets(*given, folder=folder):
            return sft.check_weights(folder, folder, sft.read_headers(folder, folder), list(given))

        assert targets("all-linear") == linear and targets("o_proj") == ["o_proj"]
        for wrong in ("foo", "lm_head", "embed_tokens", "input_layernorm", *(set(SEVEN) - set(linear))):
            assert_says(error_of(targets, wrong), f"--lora-target-modules {wrong}", *linear, "all-linear")


def test_fingerprint(tmp_path):
    """The same for a copy in several files; other weights of the same shape have another one."""
    folder = family("llama3")
    ours = fingerprint(folder)
    assert len(ours) == 64 and ours == fingerprint(folder)
    shutil.copytree(folder, tmp_path / "other")
    with open(tmp_path / "other/model.safetensors", "r+b") as file:
        tensor = sft.read_headers("other", str(folder))["model.layers.1.self_attn.v_proj.weight"]
        file.seek(tensor.start)
        file.write(bytes(4))
    assert fingerprint(tmp_path / "other") != ours
    load(folder, "eager").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "sharded") == ours


def test_another_base_cannot_be_resumed(tmp_path):
    """Same name, same shape, other weights."""
    (tmp_path / "train.chatml").write_text(dialogues(8))
    shutil.copytree(family("llama3"), tmp_path / "base")
    options = ("--model", "base", "--output", "out", *TINY)
    code, printed = run(tmp_path, *options)
    assert code == 0, printed
    weights = load(tmp_path / "base", "eager")
    with torch.no_grad():
        weights.model.layers[0].mlp.up_proj.weight.mul_(2)
    weights.save_pretrained(tmp_path / "base")
    code, printed = run(tmp_path, *options, "--resume")
    assert code == 2 and "weights of --model" in printed.splitlines()[-1], printed
    assert TOKENS.keys() == {*TRAINABLE, *REFUSED}
