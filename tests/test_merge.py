"""merge_lora.py: the numbers are PEFT's, the folder is whole, and what cannot be merged is refused in one line."""

import errno
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from engine import PROJECTIONS, chat_format, complete_adapter, random_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import merge_lora

ROOT = Path(__file__).resolve().parent.parent
RANK_PATTERN = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}


@pytest.fixture(scope="module")
def sharded(tiny_llama31, tmp_path_factory) -> Path:
    """tiny_llama31 in several shards, as real models come."""
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copytree(tiny_llama31, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama31, dtype="auto").save_pretrained(
        folder / "weights", max_shard_size="10MB"
    )
    for file in (folder / "weights").glob("model*"):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "weights")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_llama31, tmp_path_factory) -> Path:
    return random_adapter(tiny_llama31, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    """An adapter folder that a test may spoil."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def merge(adapter: Path, output: Path, *options) -> Path:
    merge_lora.main(["--adapter", str(adapter), "--output", str(output), *map(str, options)])
    return output


def run(*arguments, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "merge_lora.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def fingerprint(folder: Path) -> str:
    return merge_lora.fingerprint(merge_lora.read_base_headers(folder))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def peft_merged(base, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT's merge_and_unload makes of a base: a folder, or a model that is loaded already."""
    if isinstance(base, Path):
        base = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()


def assert_equal(ours: dict, theirs: dict):
    assert (
        ours.keys() <= theirs.keys() and ours.keys() | {"lm_head.weight"} == theirs.keys()
    )  # a tied head is not stored
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def edit_json(file: Path, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def name_base(adapter: Path, model: str, revision: str | None):
    """The record with another name of the base, and its weights as they were."""
    file = adapter / "training_args.json"
    edit_json(file, base=json.loads(file.read_text())["base"] | {"model": model, "revision": revision})


# ---- the numbers ----


@pytest.mark.parametrize("lora", [{}], ids=["lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bit_for_bit_what_peft_merges(sharded, tiny_llama31, tmp_path, dtype, lora):
    base = sharded
    if dtype != torch.bfloat16:
        base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
        save_file(
            {k: v.to(dtype) for k, v in weights(tiny_llama31).items()}, base / "model.safetensors", {"format": "pt"}
        )
        edit_json(base / "config.json", torch_dtype=str(dtype).removeprefix("torch."))
    adapter = random_adapter(base, tmp_path / "adapter", **lora)
    ours, before = weights(merge(adapter, tmp_path / "merged")), weights(base)
    assert_equal(ours, peft_merged(base, adapter))
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert changed == {n for n in ours if n.split(".")[-2] in PROJECTIONS}  # all of them, and nothing else


@pytest.mark.parametrize("lora", [{}], ids=["lora"])
def test_pieces_of_a_weight_are_merged_as_the_whole(tiny_llama31, tmp_path, monkeypatch, lora):
    """Pieces of 32 rows, merged in blocks of 16: each gets its own rows of the adapter."""
    monkeypatch.setattr(merge_lora, "BLOCK", 1)
    adapter = random_adapter(tiny_llama31, tmp_path / "adapter", **lora)
    assert_equal(weights(merge(adapter, tmp_path / "merged")), peft_merged(tiny_llama31, adapter))


def test_tied_embeddings_and_a_single_file(smollm2, tmp_path):
    adapter = random_adapter(smollm2, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged")
    assert_equal(weights(merged), peft_merged(smollm2, adapter))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_adapter_saved_in_bf16_is_merged_in_fp32_as_peft_does(tiny_llama31, tmp_path):
    adapter = random_adapter(tiny_llama31, tmp_path / "adapter", dtype=torch.bfloat16)
    assert next(iter(weights(adapter).values())).dtype == torch.bfloat16
    assert_equal(weights(merge(adapter, tmp_path / "merged")), peft_merged(tiny_llama31, adapter))


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_model(tiny_llama31, tmp_path):
    """A base of 0.8 GB, whose largest adapted tensor has 16 MB, in one file of zeros with holes."""
    config = json.loads((tiny_llama31 / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    (base / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, value in model.named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [at, at := at + 2 * value.numel()]}
    text = json.dumps(header).encode()
    with open(base / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    assert at > 7e8
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    from peft import LoraConfig, get_peft_model

    names = get_peft_model(model, LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    lora = {n.replace(".default", ""): torch.randn(v.shape) for n, v in names.named_parameters() if "lora_" in n}
    save_file(lora, adapter / "adapter_model.safetensors")
    names.peft_config["default"].save_pretrained(adapter)
    complete_adapter(base, adapter)

    # VmHWM is the peak of this process alone; ru_maxrss would begin with that of pytest, which started it.
    code = r"""if True:
        import re, sys, merge_lora
        load = merge_lora.import_libraries
        peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
        def load_and_measure():
            global loaded
            load()
            loaded = peak()
        merge_lora.import_libraries = load_and_measure
        merge_lora.main(sys.argv[1:])
        print("grew", (peak() - loaded) // 1024)
    """
    command = [sys.executable, "-c", code, "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout.split("grew")[1]) < 150, done.stdout  # MiB


# ---- other families of models ----

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 49152, "max_position_embeddings": 4096,
         "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [2.0 + i for i in range(8)]}
LONGROPE = {"type": "longrope", **FACTORS}
NO_SCALING = {"rope_theta": 10000.0, "rope_scaling": None}
FAMILIES = {  # name: model type, settings of its config, targets, RoPE that old readers must find in the merged folder
    "llama": ("llama", {"tie_word_embeddings": True}, PROJECTIONS, NO_SCALING),
    "qwen2": ("qwen2", {}, PROJECTIONS, NO_SCALING),  # biases on q, k and v
    "qwen3": ("qwen3", {}, PROJECTIONS, NO_SCALING),  # norms on q and k
    "mistral": ("mistral", {"sliding_window": 512}, PROJECTIONS, NO_SCALING),
    "gemma2": ("gemma2", {}, PROJECTIONS, NO_SCALING),
    "gemma3": ("gemma3_text", {}, PROJECTIONS,
               {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None}),
    "phi3": ("phi3", {}, FUSED, {**NO_SCALING, "partial_rotary_factor": 1.0}),
    "phi3 longrope": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 2048}, FUSED,
                      {"rope_theta": 10000.0, "rope_scaling": LONGROPE, "original_max_position_embeddings": 2048}),
    "llama linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0}, PROJECTIONS,
                     {"rope_theta": 5000.0}),
}  # fmt: skip


def family_base(family: str, smollm2: Path, folder: Path) -> Path:
    """A small random model of this family, with biases that are not zero, and SmolLM2's tokenizer."""
    model_type, settings, _, _ = deepcopy(FAMILIES[family])  # transformers writes into these dicts
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **SIZES, **settings), dtype=torch.bfloat16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm2 / name, folder / name)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_merged_as_by_peft(family, short_smollm2, tmp_path):
    """Equal weights, and equal logits of the whole folder: what its config says is part of the model."""
    base = family_base(family, short_smollm2, tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=FAMILIES[family][2])
    merged = merge(adapter, tmp_path / "merged")
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    by_peft = by_peft.merge_and_unload()
    ours, theirs = weights(merged), by_peft.state_dict()
    assert ours.keys() == weights(base).keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert sum(not torch.equal(value, weights(base)[name]) for name, value in ours.items()) == 2 * len(
        FAMILIES[family][2]
    )
    ids = torch.arange(5, 105)[None]
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, by_peft(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_old_readers_find_the_rope_of_each_family(family, short_smollm2, tmp_path):
    base = family_base(family, short_smollm2, tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=[FAMILIES[family][2][0]])
    merged = merge(adapter, tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text())
    wanted = FAMILIES[family][3]
    assert {key: config.get(key) for key in wanted} == wanted
    assert config["architectures"] == [type(AutoModelForCausalLM.from_pretrained(base)).__name__]
    if family == "llama linear":
        assert config["rope_scaling"] == {"factor": 2.0, "rope_type": "linear", "type": "linear"}
    assert "PARAMETER num_ctx 4096\n" in (merged / "Modelfile").read_text()


def test_gemma3_in_its_old_layout(short_smollm2, tmp_path):
    """As published: two thetas and the scaling of the full layers at the top level. They stay as they are."""
    base = family_base("gemma3", short_smollm2, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    old = {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    (base / "config.json").write_text(json.dumps(config | old))
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((merge(adapter, tmp_path / "merged") / "config.json").read_text())
    assert {key: config[key] for key in old} == old
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 5e3
    assert config["rope_parameters"]["full_attention"]["factor"] == 8.0


# ---- the base of the training ----


def test_the_fingerprint_sees_other_weights_and_nothing_else(sharded, tiny_llama31, tmp_path):
    """The same for one file or several; another as soon as one tensor differs in its first bytes, shape or dtype."""

    recorded = fingerprint(tiny_llama31)
    assert fingerprint(sharded) == recorded and len(recorded) == 64
    tensors = weights(tiny_llama31)

    def changed(**changes):
        save_file({**tensors, **changes}, tmp_path / "model.safetensors", {"format": "pt"})
        return fingerprint(tmp_path)

    assert changed() == recorded
    norm, head = tensors["model.norm.weight"], tensors["lm_head.weight"].clone()
    head[0, 0] += 1
    assert changed(**{"lm_head.weight": head}) != recorded
    assert changed(**{"model.norm.weight": norm.float()}) != recorded
    assert changed(**{"model.norm.weight": norm[None]}) != recorded
    assert changed(extra=norm.clone()) != recorded


def test_the_fingerprint_as_it_is_defined(tiny_llama31):
    """The definition, spelt out a second way: trainer and merge must agree on these bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(tiny_llama31).items()):
        digest.update(f"{name} BF16 {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes()[:4096])
    assert fingerprint(tiny_llama31) == digest.hexdigest()


def test_a_base_with_other_weights_is_refused_unless_forced(copy, tiny_llama31, tmp_path):
    merge(copy, tmp_path / "right")
    other = Path(shutil.copytree(tiny_llama31, tmp_path / "other"))
    tensors = weights(other)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    line = (f"{other}: not the base that the adapter was trained on, its weights differ; name the right --base, "
            "or merge anyway with --force")  # fmt: skip
    refused(line, copy, tmp_path, "--base", other)
    forced = merge(copy, tmp_path / "forced", "--base", other, "--force")
    assert torch.equal(weights(forced)["lm_head.weight"], tensors["lm_head.weight"])
    with open(other / "model.safetensors", "r+b") as file:
        file.truncate(20_000_000)
    line = f"{other}/model.safetensors: incomplete, or not a safetensors file; copy or download it again"
    refused(line, copy, tmp_path, "--base", other)


# ---- a checkpoint of a run ----


@pytest.mark.parametrize("ended", [True, False], ids=["after training", "during training"])
def test_a_checkpoint_is_merged_with_the_runs_record(copy, tiny_llama31, tmp_path, ended):
    checkpoint = copy / "checkpoint-20"
    checkpoint.mkdir()
    for name in merge_lora.CHECKPOINT_FILES:
        shutil.move(copy / name, checkpoint / name)
    if not ended:
        (copy / "config.json").unlink()
    assert_equal(weights(merge(checkpoint, tmp_path / "merged")), peft_merged(tiny_llama31, checkpoint))
    (copy / "training_args.json").unlink()
    line = f"{copy}/training_args.json: missing; train_sft_dolores.py writes it when training has ended"
    refused(line, checkpoint, tmp_path)


# ---- the folder ----


def test_the_folder_is_exactly_this(sharded, tmp_path):
    adapter = random_adapter(sharded, tmp_path / "adapter")
    (sharded / "USE_POLICY.md").write_text("policy")
    merged = merge(adapter, tmp_path / "merged")
    shards = {file.name for file in sharded.glob("*.safetensors")}
    assert {path.name for path in merged.iterdir()} == shards | {
        "Modelfile", "README.md", "USE_POLICY.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert all(path.is_file() and not path.is_symlink() for path in merged.iterdir())
    for name, source in (("tokenizer.json", sharded), ("model.safetensors.index.json", sharded),
                         ("chat_template.jinja", adapter)):  # fmt: skip
        assert (merged / name).read_bytes() == (source / name).read_bytes()
    for name in shards:  # the header, and with it all offsets, are the base's
        theirs = (sharded / name).read_bytes()
        length = 8 + int.from_bytes(theirs[:8], "little")
        assert (merged / name).read_bytes()[:length] == theirs[:length]


LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_config_has_rope_and_dtype_in_both_layouts(tiny_llama31, adapter, smollm2, tmp_path):
    """From an old file (tiny_llama31 has Meta's layout) and from one that transformers 5 wrote (smollm2)."""
    old = json.loads((merge(adapter, tmp_path / "old") / "config.json").read_text())
    assert old == json.loads((tiny_llama31 / "config.json").read_text()) | {
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_SCALING,
        "rope_parameters": {"rope_theta": 500000.0, **LLAMA3_SCALING},
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    new = random_adapter(smollm2, tmp_path / "adapter", target_modules=["q_proj"])
    new = json.loads((merge(new, tmp_path / "new") / "config.json").read_text())
    assert new == json.loads((smollm2 / "config.json").read_text()) | {
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    for folder, base in (("old", tiny_llama31), ("new", smollm2)):
        assert (
            AutoConfig.from_pretrained(tmp_path / folder).rope_parameters
            == AutoConfig.from_pretrained(base).rope_parameters
        )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ([128001, 128008, 128009], [128001, 128008, 128009]),
        ([128001, 128008], [128001, 128008, 128009]),
        (128001, [128001, 128009]),
        (128009, 128009),
    ],
)
def test_generation_config_keeps_the_list_and_holds_the_trained_end(tiny_llama31, adapter, tmp_path, theirs, ours):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    edit_json(base / "generation_config.json", eos_token_id=theirs)
    written = json.loads((merge(adapter, tmp_path / "m", "--base", base) / "generation_config.json").read_text())
    assert written == json.loads((base / "generation_config.json").read_text()) | {"eos_token_id": ours}


def test_generation_config_where_the_base_has_none(tiny_llama31, adapter, tmp_path):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    (base / "generation_config.json").unlink()
    written = json.loads((merge(adapter, tmp_path / "m", "--base", base) / "generation_config.json").read_text())
    assert written == {"eos_token_id": [128001, 128008, 128009]}  # config.json's


def test_tokenizer_config_is_for_old_readers_too(copy, llama31_tokenizer, tmp_path):
    edit_json(
        copy / "tokenizer_config.json",
        is_local=True,
        local_files_only=True,
        chat_template="{% if tools %}tool_call{% endif %}",
        extra_special_tokens=["<|eom_id|>"],
        pad_token="<|finetune_right_pad_id|>",
    )
    merged = merge(copy, tmp_path / "merged")
    written = json.loads((merged / "tokenizer_config.json").read_text())
    added = written.pop("added_tokens_decoder")
    assert len(added) == 256 and added["128009"]["content"] == "<|eot_id|>" and added["128009"]["special"]
    assert written == {
        "add_bos_token": True,
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "model_max_length": 131072,
        "additional_special_tokens": ["<|eom_id|>"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = "L'été, ça va ? 🙂 <|eot_id|>\n\n12345"
    assert tokenizer(text).input_ids == llama31_tokenizer(text).input_ids
    assert tokenizer.pad_token_id == 128004 and tokenizer.chat_template == (copy / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_what_is_printed(adapter, tiny_llama31, tmp_path):
    """Few lines, nothing on stderr: no warning, no progress bar."""
    done = run("--adapter", adapter, "--output", tmp_path / "merged")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"merging    {adapter} into {tiny_llama31} (0.03 GB)"
    assert lines[1].startswith(f"written    {tmp_path}/merged (0.03 GB) in ") and lines[1].endswith(" s")
    assert lines[2:] == [
        "checked    21 tensors with the base's names, shapes and dtypes, no NaN or infinity",
        "checked    28 adapter tensors used once each, in 14 layers",
        "checked    RoPE in both layouts, theta 500000, as in the base; end of answer [128001, 128008, 128009]",
        "tokenizer  Ollama reads this tokenizer as llama-bpe",
        f"next       ollama create dolores-v5 -f {tmp_path}/merged/Modelfile",
    ]


def test_the_name_is_in_the_command_and_the_card(copy, tmp_path, capsys):
    edit_json(copy / "training_args.json", args={"name": "marmiton"})
    merged = merge(copy, tmp_path / "my cook")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
    assert command == ["ollama", "create", "marmiton", "-f", f"{merged}/Modelfile"]
    assert "\n# marmiton\n" in (merged / "README.md").read_text()
    merge(copy, merged, "--overwrite", "--name", "chef-de-cuisine")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
    assert command == ["ollama", "create", "chef-de-cuisine", "-f", f"{merged}/Modelfile"]
    assert "ollama create chef-de-cuisine -f 'my cook'/Modelfile" in (merged / "README.md").read_text()
    with pytest.raises(SystemExit):  # Ollama would refuse it
        merge(copy, merged, "--overwrite", "--name", "chef de cuisine")


def card(merged: Path) -> tuple[dict, str]:
    """The front matter as the Hub reads it, and the text."""
    from huggingface_hub import ModelCard

    read = ModelCard.load(merged / "README.md")
    return read.data.to_dict(), read.text


def test_the_card_of_a_llama_from_the_hub(copy, tiny_llama31, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tiny_llama31)
    name_base(copy, "meta-llama/Llama-3.1-8B-Instruct", "0e9e39f")
    front, text = card(merge(copy, tmp_path / "merged"))
    assert front == {"base_model": "meta-llama/Llama-3.1-8B-Instruct", "library_name": "transformers",
                     "pipeline_tag": "text-generation"}  # fmt: skip
    assert "`meta-llama/Llama-3.1-8B-Instruct` at revision `0e9e39f` (bfloat16)" in text
    assert "**Built with Llama.**" in text and "@" not in text
    assert "ollama create dolores-v5 -f merged/Modelfile" in text and str(tmp_path) not in text


def test_the_card_of_another_base(short_smollm2, tmp_path):
    """SmolLM2 has Llama's architecture and not its license; a local folder is no base_model on the Hub."""
    front, text = card(merge(random_adapter(short_smollm2, tmp_path / "adapter"), tmp_path / "merged"))
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "Built with Llama" not in text and "license of the base model applies" in text


@pytest.mark.parametrize(
    ("model", "license", "built_with_llama"),
    [
        ("meta-llama/Meta-Llama-3-8B", "", True),
        ("/models/llama-2-7b-chat", "", True),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "", False),
        ("/models/base", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", True),
        ("/models/base", "Apache License", False),
    ],
)
def test_which_bases_are_metas_llama(tmp_path, model, license, built_with_llama):
    (tmp_path / "LICENSE").write_text(license)
    assert merge_lora.is_metas_llama(model, tmp_path) == built_with_llama


SYSTEM = 'Tu es « Dolores ».\nTu dis "oui"\t{{ .Role }} \\n et "'


@pytest.mark.parametrize(
    ("system", "written", "note"),
    [
        (SYSTEM, SYSTEM, "system     the turn that all conversations share is in the Modelfile"),
        ("Qui\u00a0?\u202f!", "Qui ? !", "warning    no-break spaces in the system turn became spaces"),
        ('a """ b', None, 'warning    the system turn contains """, which a Modelfile cannot hold'),
        (None, None, "tokenizer  Ollama"),
    ],
)
def test_the_shared_system_turn_is_in_the_modelfile(copy, tmp_path, capsys, system, written, note):
    edit_json(copy / "training_args.json", data={"system": system})
    modelfile = (merge(copy, tmp_path / "merged") / "Modelfile").read_text()
    assert modelfile.endswith(f'\nSYSTEM """{written}"""\n') if written else "SYSTEM" not in modelfile
    assert capsys.readouterr().out.splitlines()[-2].startswith(note)


def test_how_ollama_will_split_text(llama31_tokenizer, smollm2, tmp_path):
    """Llama 3.1's patterns are known; SmolLM2's are not, nor Llama's with one letter changed."""
    llama = llama31_tokenizer.backend_tokenizer.to_str().replace("<|eot_id|>", "<|im_end|>")
    for text, read_as in (
        (llama, "this tokenizer as llama-bpe"),
        ((smollm2 / "tokenizer.json").read_text(), None),
        (llama.replace("{1,3}", "{1,2}"), None),
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        pre_tokenizer = merge_lora.read_tokenizer(tmp_path / "tokenizer.json", "<|im_end|>").pre_tokenizer
        assert merge_lora.ollama_tokenizer(tmp_path, pre_tokenizer) == read_as


def test_a_tokenizer_that_ollama_does_not_know(short_smollm2, tmp_path, capsys, monkeypatch):
    """Ollama is warned of, and not proposed as the next step."""
    monkeypatch.setattr(sys, "argv", ["merge_lora.py"])
    merge(random_adapter(short_smollm2, tmp_path / "adapter"), tmp_path / "merged")
    shown = capsys.readouterr().out
    assert "warning    Ollama does not know this tokenizer" in shown and "ollama create" not in shown
    assert shown.endswith(f"next       {sys.executable} merge_lora.py --chat {tmp_path}/merged\n")


def test_one_bos_whatever_the_route(adapter, tiny_llama31, llama31_tokenizer, tmp_path):
    """apply_chat_template, a pipeline, encoded text, --chat and training: the same ids, one BOS at the start."""
    from transformers import pipeline

    import train_sft_dolores as sft

    merged = merge(adapter, tmp_path / "merged")
    assert (merged / "chat_template.jinja").read_text().startswith("{{- bos_token }}")
    roles, contents = (
        ("system", "user", "assistant", "user"),
        ("Tu es Dolores.", "Qui es-tu ?", "Personne.", "Et moi ?"),
    )
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True).input_ids
    assert ids[0] == 128000 and ids.count(128000) == 1

    chat = chat_format("dolores", "<|eot_id|>")
    encode = sft.Encoder(llama31_tokenizer, sft.ChatFormat(*(chat[field] for field in sft.ChatFormat._fields)))
    turns = [sft.Turn(message["role"], message["content"], 1) for message in messages]
    ((trained, _),) = encode([[*turns, sft.Turn("assistant", "Un autre.", 1)]])
    assert trained.tolist()[: len(ids)] == ids

    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text, add_special_tokens=False).input_ids == ids

    generator = pipeline("text-generation", str(merged), dtype=torch.float32, device="cpu")
    generate, seen = generator.model.generate, []
    generator.model.generate = lambda **inputs: seen.append(inputs["input_ids"][0].tolist()) or generate(**inputs)
    generator(messages, max_new_tokens=1)
    assert seen == [ids]


# ---- chat in the terminal ----


@pytest.mark.parametrize(
    ("merged", "terminal"), [(False, True), (True, True), (True, False)], ids=["adapter", "merged folder", "questions"]
)
def test_chat_streams_answers_in_the_models_format(short_smollm2, tmp_path, monkeypatch, capsys, merged, terminal):
    from transformers import GenerationMixin

    folder = random_adapter(short_smollm2, tmp_path / "adapter")
    edit_json(folder / "training_args.json", data={"system": "Tu es Dolores."})
    if merged:
        folder = merge(folder, tmp_path / "merged")
    lines, seen = iter(["Qui es-tu ?", "Et moi ?", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    typed = io.StringIO("Qui es-tu ?\n\nEt moi ?\n")  # an empty line in a file ends nothing
    typed.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdin", typed)
    monkeypatch.setattr(merge_lora, "CHAT_TOKENS", 8)
    generate = GenerationMixin.generate

    def watched(self, *inputs, **settings):
        seen.append((settings["input_ids"][0].tolist(), settings["temperature"], settings["stop_strings"]))
        return generate(self, *inputs, **settings)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    capsys.readouterr()
    merge_lora.main(["--chat", str(folder)])
    printed = capsys.readouterr().out
    if terminal:
        assert len(printed.split()) > 10
    else:
        blocks = printed.removeprefix("\n> ").split("\n> ")
        questions, answers = zip(*(block.split("\n", 1) for block in blocks), strict=True)
        assert questions == ("Qui es-tu ?", "Et moi ?") and all(map(str.strip, answers))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (first, temperature, stops), (second, _, _) = seen
    prompt = "<|system|>\nTu es Dolores.\n<|user|>\nQui es-tu ?\n<|assistant|>\n"
    assert tokenizer.decode(first) == prompt and temperature == 0.7
    assert stops == ["<|im_end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    if terminal:
        assert tokenizer.decode(second).startswith(prompt)
        assert tokenizer.decode(second).endswith("Et moi ?\n<|assistant|>\n")
    else:  # each question is a conversation of its own
        assert tokenizer.decode(second) == prompt.replace("Qui es-tu ?", "Et moi ?")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_an_answer(short_smollm2, tmp_path, monkeypatch, capsys, number, status):
    """The chat goes on, and what was written of the answer is in its history; SIGTERM ends the chat."""
    from transformers import GenerationMixin, TextStreamer

    folder = random_adapter(short_smollm2, tmp_path / "adapter")
    lines, seen = iter(["Qui es-tu ?", "Et moi ?", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin", typed := io.StringIO())
    typed.isatty = lambda: True
    put, generate = TextStreamer.put, GenerationMixin.generate

    def interrupted(self, value):
        put(self, value)
        if len(seen) == 1 and len(self.token_cache) == 5:
            os.kill(os.getpid(), number)

    def watched(self, *inputs, **settings):
        seen.append(settings["input_ids"][0])
        return generate(self, *inputs, **{**settings, "max_new_tokens": 8})

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    monkeypatch.setattr(GenerationMixin, "generate", watched)
    torch.manual_seed(0)
    capsys.readouterr()
    assert merge_lora.run(["--chat", str(folder)]) == status
    opening, system, answers, answer, *_ = capsys.readouterr().out.split("\n")
    assert "Ctrl-C ends an answer" in opening and system.startswith("system     none") and "0.7" in answers
    answer = answer.strip()
    assert len(seen) == (1 if status else 2)
    if not status:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert answer and len(tokenizer(answer).input_ids) <= 6
        assert f"Qui es-tu ?\n<|assistant|>\n{answer}<|im_end|>" in tokenizer.decode(seen[1])


def test_chat_reads_bytes_that_are_no_text(short_smollm2, tmp_path):
    """Half a character, as Backspace leaves it in some terminals, or another encoding."""
    folder = random_adapter(short_smollm2, tmp_path / "adapter")
    command = [sys.executable, "merge_lora.py", "--chat", str(folder)]
    done = subprocess.run(command, input=b"mon ch\xe9ri ?\n", capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"") and b"ch" in done.stdout


def test_chat_stops_at_a_role_tag():
    stops = ["<|eot_id|>", "<|user|>"]
    assert merge_lora.before_stop("Oui. <|user|>\nEt <|eot_id|>", stops) == "Oui. "
    assert merge_lora.before_stop("Oui.", stops) == "Oui."


def test_chat_without_a_model(tmp_path):
    done = run("--chat", tmp_path / "none", input="")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"{tmp_path}/none: no such folder; ")


def test_help_waits_for_no_library():
    code = "import sys, merge_lora; assert not {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    shown = run("--help").stdout
    for word in ("runs_dolores_v5/llama31_clean", "dolores_v5_full", "--overwrite"):
        assert word in shown
    assert "None" not in shown and shown.count("\n  python3 merge_lora.py") == 3  # three examples


# ---- what is refused: one line, before anything is written ----


def refused(message: str, adapter: Path, tmp_path: Path, *options):
    """`message` is the whole line, with {a} for the adapter folder and {o} for the output."""
    output, before = tmp_path / "refused", set(tmp_path.iterdir())
    with pytest.raises(merge_lora.InputError) as error:
        merge(adapter, output, *options)
    assert str(error.value) == message.format(a=adapter, o=output)
    assert "\n" not in str(error.value) and set(tmp_path.iterdir()) == before


def test_one_line_and_exit_status_2(tmp_path):
    done = run("--adapter", tmp_path / "none")
    wanted = f"{tmp_path}/none: no such folder; train one with train_sft_dolores.py, or name it with --adapter\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--adaptor", "a"], "unknown option --adaptor; did you mean --adapter?"),
        (["--over"], "unknown option --over; did you mean --overwrite?"),  # no abbreviations
        (["--xyz=1"], "unknown option --xyz"),
        (["my_run"], "unexpected argument my_run"),
        (["--adapter"], "--adapter: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, line, capsys):
    with pytest.raises(SystemExit) as ended:
        merge_lora.parse_args(flags)
    written = capsys.readouterr()
    said = written.err.replace("'original', 'nf4'", "original, nf4")  # Python 3.11 puts quotes there
    assert (ended.value.code, written.out, said) == (2, "", f"merge_lora.py: {line}; see --help\n")


@pytest.mark.parametrize("name", [*merge_lora.CHECKPOINT_FILES, *merge_lora.RUN_FILES])
def test_a_missing_adapter_file(copy, tmp_path, name):
    (copy / name).unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    missing = f"{{a}}/{name}: missing; train_sft_dolores.py writes it when training has ended"
    refused(missing, copy, tmp_path)
    (copy / "checkpoint-7").mkdir()
    refused(
        f"{missing}: continue it with --resume, or merge what is there with --adapter {copy}/checkpoint-7",
        copy,
        tmp_path,
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("modules_to_save", ["embed_tokens"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["weight"]),
        ("something_new", {"a": 1}),
    ],
)
def test_settings_that_a_merge_would_lose(copy, tmp_path, setting, value):
    edit_json(copy / "adapter_config.json", **{setting: value})
    line = f"{{a}}/adapter_config.json: {setting} is set, which this merge would lose; use PEFT's own merge_and_unload"
    refused(line, copy, tmp_path)


def test_adapters_of_another_kind(copy, tiny_llama31, tmp_path):
    edit_json(copy / "adapter_config.json", peft_type="IA3")
    refused("{a}/adapter_config.json: IA3 adapter; only a plain LoRA can be merged here", copy, tmp_path)
    edit_json(copy / "adapter_config.json", peft_type="LORA")
    for key, value in (("init_lora_weights", "pissa"), ("use_dora", True), ("rank_pattern", {"q_proj": 2})):
        edit_json(copy / "adapter_config.json", **{key: value})
        line = f"{{a}}/adapter_config.json: {key} is set, which this merge would lose; use PEFT's own merge_and_unload"
        refused(line, copy, tmp_path)
        edit_json(copy / "adapter_config.json", **{key: True if key == "init_lora_weights" else None})
    other = random_adapter(tiny_llama31, tmp_path / "embedding", target_modules=["embed_tokens"])
    with pytest.raises(merge_lora.InputError, match=r"model\.embed_tokens.* fits no layer of the base"):
        merge(other, tmp_path / "merged")


def test_another_base(copy, smollm2, tmp_path):
    line = f"{smollm2}: hidden_size is 576, but the adapter's base had 64; name the right --base"
    refused(line, copy, tmp_path, "--base", smollm2)


@pytest.mark.parametrize(("key", "here"), [("vocab_size", 128000), ("num_hidden_layers", 3), ("model_type", "mistral")])
def test_a_base_that_differs_in_its_config(copy, tiny_llama31, tmp_path, key, here):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    there = json.loads((base / "config.json").read_text())[key]
    edit_json(base / "config.json", **{key: here})
    line = f"{base}: {key} is {here}, but the adapter's base had {there}; name the right --base"
    refused(line, copy, tmp_path, "--base", base)


def test_an_adapter_file_that_is_not_the_configs(copy, tmp_path):
    tensors = load_file(copy / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, copy / "adapter_model.safetensors")
    fix = "fits no layer of the base, or is not complete; name the right --base"
    refused(f"{{a}}/adapter_model.safetensors: model.layers.1.mlp.up_proj {fix}", copy, tmp_path)
    save_file({**tensors, "base_model.model.extra.lora_A.weight": torch.ones(1)}, copy / "adapter_model.safetensors")
    refused(f"{{a}}/adapter_model.safetensors: extra {fix}", copy, tmp_path)
    both = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(both, copy / "adapter_model.safetensors")
    line = "no adapter of model.layers.1.mlp.up_proj.weight in it; is it complete, and does it belong to this base?"
    refused(f"{{a}}/adapter_model.safetensors: {line}", copy, tmp_path)


def test_a_quantised_base(copy, tiny_llama31, tmp_path):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    tensors = weights(base)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4096, 1, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors")
    line = f"{base}/model.safetensors: model.layers.0.mlp.up_proj.weight is U8; the base must have bf16, f16 or f32 weights"
    refused(line, copy, tmp_path, "--base", base)
    edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    line = f"{base}: already quantized; name the 16-bit base that it was made from with --base"
    refused(line, copy, tmp_path, "--base", base)


def test_files_that_are_cut_off(copy, tiny_llama31, tmp_path):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    with open(base / "model.safetensors", "r+b") as file:
        file.truncate(20_000_000)
    line = f"{base}/model.safetensors: incomplete, or not a safetensors file; copy or download it again"
    refused(line, copy, tmp_path, "--base", base)
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n")
    refused(line, copy, tmp_path, "--base", base)
    (base / "model.safetensors").unlink()
    line = f"{base}/model.safetensors: missing; the base must be a folder of safetensors, or a Hugging Face id"
    refused(line, copy, tmp_path, "--base", base)
    (copy / "training_args.json").write_text("{\n  nonsense")
    refused("{a}/training_args.json:2: not JSON (Expecting property name enclosed in double quotes); copy or write it again",
            copy, tmp_path)  # fmt: skip


def test_no_or_infinite_numbers(copy, tmp_path):
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(merge_lora.InputError, match=r"NaN or infinity in model.layers.1.self_attn.q_proj.weight"):
        merge(copy, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_infinity_in_a_tensor_without_adapter(copy, tiny_llama31, tmp_path):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    tensors = weights(base)
    tensors["model.embed_tokens.weight"][-1, -1] = float("-inf")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(merge_lora.InputError, match=r"NaN or infinity in model.embed_tokens.weight"):
        merge(copy, tmp_path / "merged", "--base", base)


def test_a_tokenizer_larger_than_the_embedding(copy, tmp_path):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 128256, "content": "<|new|>"})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(
        "{a}/tokenizer.json: has token id 128256, but the base's embedding 128256 rows; name the right --base",
        copy,
        tmp_path,
    )


def test_an_end_token_that_does_not_exist(copy, tmp_path):
    edit_json(copy / "training_args.json", chat_format=chat_format("chatml", ""))
    line = "{a}/tokenizer.json: has no <|im_end|>, the chat format's end token; is it the right adapter?"
    refused(line, copy, tmp_path)


# ---- the base by name ----


def test_a_base_that_is_nowhere(copy, tmp_path):
    refused(
        "./none: no such base folder; --base takes a folder or a Hugging Face id", copy, tmp_path, "--base", "./none"
    )
    line = "org/none: not in the cache, and cannot reach the Hugging Face Hub; name a local folder with --base"
    refused(line, copy, tmp_path, "--base", "org/none")  # the tests are offline
    name_base(copy, "/gone/base", None)
    refused("/gone/base: no such base folder; name it with --base", copy, tmp_path)


def test_the_hub_is_asked_for_the_trained_revision(copy, tiny_llama31, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or tiny_llama31
    )
    name_base(copy, "org/base", "0e9e39f")
    merge(copy, tmp_path / "merged")
    merge(copy, tmp_path / "other", "--base", "org/copy")
    assert [(name, kw["revision"]) for name, kw in asked] == [("org/base", "0e9e39f"), ("org/copy", None)]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("GatedRepoError", "org/base: gated; accept its license on huggingface.co/org/base, then `hf auth login`"),
        (
            "RepositoryNotFoundError",
            "org/base: not found on the Hugging Face Hub; check the name, run `hf auth login`, or name a local folder with --base",
        ),
        ("RevisionNotFoundError", "org/base: no revision abc on the Hugging Face Hub; name a local folder with --base"),
    ],
)
def test_what_the_hub_says(copy, tmp_path, monkeypatch, error, line):
    import huggingface_hub

    class Response:  # as much as the error's constructor looks at
        headers, request, status_code = {}, None, 403

    def fail(*_, **__):
        raise getattr(huggingface_hub.errors, error)("long\nstory", response=Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    name_base(copy, "org/base", "abc")
    refused(line, copy, tmp_path)


# ---- nothing half done ----


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_an_existing_output_is_replaced_only_when_asked(adapter, tiny_llama31, tmp_path):
    output = merge(adapter, tmp_path / "merged")
    before = digests(output)
    other = random_adapter(tiny_llama31, tmp_path / "other", seed=1)
    with pytest.raises(
        merge_lora.InputError, match="already exists; choose another --output, or replace it with --overwrite"
    ):
        merge(other, output)
    assert digests(output) == before
    (output / "stale.safetensors").write_text("left from yesterday")
    merge(other, output, "--overwrite")
    assert digests(output).keys() == before.keys() and digests(output) != before
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "other"}


def test_overwrite_spares_what_is_no_merge(copy, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(merge_lora.InputError, match=r"not created by merge_lora\.py; refusing to overwrite it"):
        merge(copy, precious, "--overwrite")
    assert (precious / "thesis.txt").read_text() == "years of work"
    for output in (copy, tmp_path):
        with pytest.raises(merge_lora.InputError, match="which is still needed; choose another --output"):
            merge(copy, output, "--overwrite")
    merge(copy, Path(tmp_path / "empty"))
    (tmp_path / "void").mkdir()
    merge(copy, tmp_path / "void")  # an empty folder is no loss


def test_a_folder_that_cannot_be_written(copy, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    line = f"{tmp_path}/file/merged: cannot write into {tmp_path}/file; make it writable or choose another --output"
    with pytest.raises(merge_lora.InputError) as error:
        merge(copy, tmp_path / "file" / "merged")
    assert str(error.value) == line


def test_a_hub_cache_that_cannot_be_written(copy, tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        Path("/sys/hub").mkdir()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    name_base(copy, "org/base", "abc")
    with pytest.raises(
        merge_lora.InputError, match=r"^org/base: cannot use the Hugging Face cache .*; set HF_HOME to "
    ):
        merge(copy, tmp_path / "merged")


def test_a_full_disk_is_seen_before_anything_is_written(copy, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    size = (merge_lora.read_adapter(copy).training["base"]["model"], "model.safetensors")
    need = (Path(*size).stat().st_size + (64 << 20)) / 1e9
    line = f"{tmp_path}: 0.01 GB free, {need:.2f} GB needed; make room or choose another --output"
    refused(line, copy, tmp_path)


SLOW = """if True:
    import sys, time, merge_lora
    merged = merge_lora.merged_rows
    def slowly(*args):
        print("writing", flush=True)
        time.sleep(0.5)
        yield from merged(*args)
    merge_lora.merged_rows = slowly
    sys.argv[0] = "merge_lora.py"
    sys.exit(merge_lora.run())
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
    ids=str,
)
@pytest.mark.slow
def test_an_interrupted_merge(adapter, tmp_path, number, status):
    output = merge(adapter, tmp_path / "merged")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # that merge ignores it at its end
    before = digests(output)
    command = [sys.executable, "-c", SLOW, "--adapter", str(adapter), "--output", str(output), "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline().startswith("merging") and process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status and digests(output) == before
    if number == signal.SIGKILL:  # no time to clean up: the next run does
        assert {path.name for path in tmp_path.iterdir()} == {"merged", ".merged.merging"}
        merge(adapter, output, "--overwrite")
    else:
        assert stderr == "stopped; nothing was changed\n"
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


def test_killed_between_the_two_renames(adapter, tmp_path):
    output = merge(adapter, tmp_path / "merged")
    before = digests(output)
    output.rename(tmp_path / ".merged.replaced")
    (tmp_path / ".merged.merging").mkdir()
    with pytest.raises(merge_lora.InputError, match="already exists"):  # it is back before anything else happens
        merge_lora.main(["--adapter", str(adapter), "--output", str(output)])
    assert digests(output) == before


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "shard: No space left on device; make room; an earlier merge is unchanged"),
        (
            errno.EROFS,
            "shard: Read-only file system; name a folder that can be written to; an earlier merge is unchanged",
        ),
    ],
)
def test_a_disk_that_fails_during_the_merge(copy, tmp_path, number, line):
    code = SLOW.replace("time.sleep(0.5)", f"import os; raise OSError({number}, os.strerror({number}), 'shard')")
    command = [sys.executable, "-c", code, "--adapter", str(copy), "--output", str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, f"{line}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# ---- verification on demand ----
