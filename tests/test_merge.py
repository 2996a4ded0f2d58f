"""merge_lora.py: the numbers are PEFT's, the folder is whole, and what cannot be merged is refused in one line."""

import errno
import hashlib
import http.server
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from engine import PROJECTIONS, chat_format, complete_adapter, fields, fingerprint, random_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import merge_lora

ROOT = Path(__file__).resolve().parent.parent


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
    command = [sys.executable, str(ROOT / "merge_lora.py"), *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bit_for_bit_what_peft_merges(sharded, tiny_llama31, tmp_path, dtype):
    base = sharded
    if dtype != torch.bfloat16:
        base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
        save_file(
            {k: v.to(dtype) for k, v in weights(tiny_llama31).items()}, base / "model.safetensors", {"format": "pt"}
        )
        edit_json(base / "config.json", torch_dtype=str(dtype).removeprefix("torch."))
    adapter = random_adapter(base, tmp_path / "adapter")
    ours, before = weights(merge(adapter, tmp_path / "merged")), weights(base)
    assert_equal(ours, peft_merged(base, adapter))
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert changed == {n for n in ours if n.split(".")[-2] in PROJECTIONS}  # all of them, and nothing else


def test_pieces_of_a_weight_are_merged_as_the_whole(tiny_llama31, tmp_path, monkeypatch):
    """Pieces of 32 rows, merged in blocks of 16: each gets its own rows of the adapter."""
    monkeypatch.setattr(merge_lora, "BLOCK", 1)
    adapter = random_adapter(tiny_llama31, tmp_path / "adapter")
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
    """A base of 0.8 GB, whose largest tensors have 263 MB, in one file of zeros with holes; safetensors and GGUF."""
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
        load = merge_lora.trainer.load_libraries
        peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
        def load_and_measure():
            global loaded
            load()
            loaded = peak()
        merge_lora.trainer.load_libraries = load_and_measure
        merge_lora.main(sys.argv[1:])
        print("grew", (peak() - loaded) // 1024)
    """
    command = [sys.executable, "-c", code, "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    # MiB. The converter's lists of 128,256 tokens and their merges take 350, whatever the model's size; the embedding
    # alone would take 500 in float32.
    assert int(done.stdout.split("grew")[1]) < 480, done.stdout


# ---- other families of models ----

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 49152, "max_position_embeddings": 4096,
         "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [2.0 + i for i in range(8)]}
LONGROPE = {"type": "longrope", **FACTORS}
FAMILIES = {  # name: model type, settings of its config, targets
    "llama": ("llama", {"tie_word_embeddings": True}, PROJECTIONS),
    "qwen2": ("qwen2", {}, PROJECTIONS),  # biases on q, k and v
    "qwen3": ("qwen3", {}, PROJECTIONS),  # norms on q and k
    "mistral": ("mistral", {"sliding_window": 512}, PROJECTIONS),
    "gemma2": ("gemma2", {}, PROJECTIONS),
    "gemma3": ("gemma3_text", {}, PROJECTIONS),
    "phi3": ("phi3", {}, FUSED),
    "phi3 longrope": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 2048}, FUSED),
    "llama linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0}, PROJECTIONS),
}


def family_base(family: str, smollm2: Path, folder: Path) -> Path:
    """A small random model of this family, with biases that are not zero, and SmolLM2's tokenizer."""
    model_type, settings, _ = deepcopy(FAMILIES[family])  # transformers writes into these dicts
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
    merged = merge(adapter, tmp_path / "merged", "--gguf", "none")
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
    assert "PARAMETER num_ctx 4096\n" in (merged / "Modelfile").read_text()


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
    """The definition, spelt out a second way: adapters trained earlier must be merged later."""
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
    refused(copy, tmp_path, str(other), "weights differ", "--base", "--force", options=["--base", other])
    forced = merge(copy, tmp_path / "forced", "--base", other, "--force")
    assert torch.equal(weights(forced)["lm_head.weight"], tensors["lm_head.weight"])


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
    refused(checkpoint, tmp_path, f"{copy}/training_args.json", "missing")


# ---- the folder ----


def test_the_folder_is_exactly_this(sharded, tmp_path):
    adapter = random_adapter(sharded, tmp_path / "adapter")
    (sharded / "USE_POLICY.md").write_text("policy")
    merged = merge(adapter, tmp_path / "merged")
    shards = {file.name for file in sharded.glob("*.safetensors")}
    assert {path.name for path in merged.iterdir()} == shards | {
        "Modelfile", "README.md", "USE_POLICY.md", "chat_template.jinja", "config.json", "dolores-v5-Q8_0.gguf",
        "generation_config.json", "model.safetensors.index.json", "params", "template", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert all(path.is_file() and not path.is_symlink() for path in merged.iterdir())
    for name, source in (("tokenizer.json", sharded), ("model.safetensors.index.json", sharded),
                         ("chat_template.jinja", adapter)):  # fmt: skip
        assert (merged / name).read_bytes() == (source / name).read_bytes()
    for name in shards:  # the header, and with it all offsets, are the base's
        theirs = (sharded / name).read_bytes()
        length = 8 + int.from_bytes(theirs[:8], "little")
        assert (merged / name).read_bytes()[:length] == theirs[:length]


def test_the_config_is_the_bases_own(tiny_llama31, adapter, smollm2, tmp_path):
    """Whoever reads the base reads the merge: Meta's old layout of RoPE (tiny_llama31), transformers' new one (smollm2)."""
    for base, trained in ((tiny_llama31, adapter), (smollm2, random_adapter(smollm2, tmp_path / "a", r=1))):
        merged = merge(trained, tmp_path / base.name, "--gguf", "none")
        assert json.loads((merged / "config.json").read_text()) == json.loads((base / "config.json").read_text())


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
def test_what_is_printed(adapter, tmp_path):
    """Few lines, nothing on stderr: no warning, no progress bar."""
    done = run("--adapter", adapter, "--output", tmp_path / "merged")
    assert (done.returncode, done.stderr) == (0, "")
    names = [line[:10].strip() for line in done.stdout.splitlines()]
    assert names == ["merging", "written", "checked", "checked", "checked", "next"]
    assert done.stdout.splitlines()[-1] == f"next       ollama create dolores-v5 -f {tmp_path}/merged/Modelfile"


def test_the_name_is_in_the_command_the_card_and_the_file(copy, tmp_path, capsys):
    edit_json(copy / "training_args.json", args={"name": "marmiton"})
    for name, options in (("marmiton", []), ("me/chef-2.1", ["--overwrite", "--name", "me/chef-2.1"])):
        merged = merge(copy, tmp_path / "my cook", *options)
        command = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
        assert command == ["ollama", "create", name, "-f", f"{merged}/Modelfile"]
        text, file = (merged / "README.md").read_text(), f"{name.split('/')[-1]}-Q8_0.gguf"
        assert f"\n# {name}\n" in text and f"ollama create {name} -f 'my cook'/Modelfile" in text and file in text
        assert fields(merged / file)["general.name"] == name
        assert (merged / "Modelfile").read_text().startswith(f"FROM ./{file}\n")


@pytest.mark.parametrize("name", ["chef de cuisine", "me.you/mine", "a" * 81, "a/b/c", "-x", ""])
def test_names_that_ollama_refuses(name, capsys):
    with pytest.raises(SystemExit):
        merge_lora.parse_args(["--name", name])
    assert "--name" in capsys.readouterr().err


def card(merged: Path) -> tuple[dict, str]:
    """The front matter as the Hub reads it, and the text."""
    from huggingface_hub import ModelCard

    read = ModelCard.load(merged / "README.md")
    return read.data.to_dict(), read.text


def test_the_card_of_a_llama_from_the_hub(copy, tiny_llama31, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **how: [] if "dry_run" in how else tiny_llama31
    )
    name_base(copy, "meta-llama/Llama-3.1-8B-Instruct", "0e9e39f")
    front, text = card(merge(copy, tmp_path / "merged"))
    assert front == {"base_model": "meta-llama/Llama-3.1-8B-Instruct", "library_name": "transformers",
                     "pipeline_tag": "text-generation"}  # fmt: skip
    assert "`meta-llama/Llama-3.1-8B-Instruct` at revision `0e9e39f` (bfloat16)" in text
    assert "**Built with Llama.**" in text and "@" not in text
    assert "ollama create dolores-v5 -f merged/Modelfile" in text and str(tmp_path) not in text


def test_the_card_says_what_is_in_the_folder(copy, tmp_path):
    for options, there in (([], "gguf transformers"), (["--gguf-only"], "gguf"), (["--gguf", "none"], "transformers")):
        _, text = card(merge(copy, tmp_path / there, *options))
        assert ("ollama create" in text and ".gguf" in text) == ("gguf" in there), text
        assert ("vLLM" in text) == ("transformers" in there)


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


@pytest.mark.parametrize(
    ("system", "written", "said"),
    [
        ('Tu es « Dolores ».\nTu dis "oui"\t{{ .Role }} \\n et "\'', None, ["system", "is in the Modelfile"]),
        ("Qui\u00a0?\u3000!\u2028", "Qui ? ! ", ["U+00A0 NO-BREAK SPACE", "U+3000 IDEOGRAPHIC SPACE", "U+2028"]),
        (
            "👩\u200d👧\u00ad\u200b\ufeff\x07\ue000",
            "👩👧",
            ["ZERO WIDTH JOINER", "SOFT HYPHEN", "U+200B", "U+FEFF", "U+0007"],
        ),
        ('a """ b', "", ["warning", '"""', "/set system"]),
        (None, "", []),
    ],
    ids=["plain", "spaces", "dropped", "quotes", "none"],
)
def test_the_shared_system_turn_is_in_the_modelfile(copy, tmp_path, capsys, system, written, said):
    """What Ollama would drop without a word is named, and not in the file."""
    edit_json(copy / "training_args.json", data={"system": system})
    merged = merge(copy, tmp_path / "merged", "--gguf", "none")
    written, modelfile = system if written is None else written, (merged / "Modelfile").read_text()
    assert modelfile.endswith(f'\nSYSTEM """{written}"""\n') if written else "SYSTEM" not in modelfile
    assert ((merged / "system").read_text() if written else "") == written
    printed = capsys.readouterr().out
    assert all(words in printed for words in said) and ("warning" in printed) == (written != (system or ""))


def test_what_the_hub_hands_to_ollama(copy, tmp_path):
    """`ollama run hf.co/…` reads template, params and system: what the Modelfile says."""
    edit_json(copy / "training_args.json", data={"system": "Tu es Dolores."})
    merged = merge(copy, tmp_path / "merged", "--gguf", "none")
    modelfile, params = (merged / "Modelfile").read_text(), json.loads((merged / "params").read_text())
    assert f'TEMPLATE """{(merged / "template").read_text()}"""' in modelfile
    assert f'SYSTEM """{(merged / "system").read_text()}"""' in modelfile
    stops = [f'stop "{stop}"' for stop in params.pop("stop")]
    assert [f"PARAMETER {line}" for line in [*(f"{k} {v}" for k, v in params.items()), *stops]] == [
        line for line in modelfile.splitlines() if line.startswith("PARAMETER")
    ]


# ---- the GGUF ----


def ggml_types(gguf: Path) -> dict[str, str]:
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_the_gguf_is_what_llama_cpps_converter_makes_of_the_folder(smollm2, tmp_path, kind):
    """Every tensor and every key, but for those that come from the folder's name and card."""
    from engine import to_gguf
    from gguf import GGUFReader

    merged = merge(random_adapter(smollm2, tmp_path / "a", r=1), tmp_path / "merged", "--gguf", kind)
    files = [merged / f"dolores-v5-{kind}.gguf", to_gguf(merged, tmp_path / "theirs.gguf", kind.lower())]
    ours, theirs = ({t.name: (t.tensor_type, t.data) for t in GGUFReader(file).tensors} for file in files)
    assert ours.keys() == theirs.keys()
    for name, (of_type, data) in ours.items():
        assert of_type == theirs[name][0] and (data == theirs[name][1]).all(), name
    ours, theirs = ({k: v for k, v in fields(f).items() if not k.startswith(("general.", "GGUF."))} for f in files)
    assert ours == theirs


def test_without_safetensors_the_gguf_is_the_same(copy, tmp_path):
    both, alone = merge(copy, tmp_path / "both"), merge(copy, tmp_path / "alone", "--gguf-only")
    name = "dolores-v5-Q8_0.gguf"
    assert (both / name).read_bytes() == (alone / name).read_bytes()
    assert {file.name for file in both.iterdir()} - {file.name for file in alone.iterdir()} == {"model.safetensors"}
    with pytest.raises(merge_lora.InputError, match="no safetensors"):
        merge_lora.main(["--chat", str(alone)])
    with pytest.raises(SystemExit):
        merge(copy, tmp_path / "neither", "--gguf-only", "--gguf", "none")


def test_a_base_that_the_converter_does_not_know(copy, tmp_path, capsys):
    """The safetensors are still written, unless they were not wanted."""
    from conversion.base import TextModel

    def unknown(*_):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextModel, "get_vocab_base_pre", unknown)
        merged = merge(copy, tmp_path / "merged")
        printed = capsys.readouterr().out
        assert "warning    no GGUF" in printed and "not recognized" in printed and "ollama create" not in printed
        assert not list(merged.glob("*.gguf")) and (merged / "model.safetensors").is_file()
        assert (merged / "Modelfile").read_text().startswith("FROM .\n")
        refused(copy, tmp_path, "--gguf-only", "not recognized", options=["--gguf-only"])


# What llama-quantize b11434 writes, compared once tensor by tensor and byte by byte: SmolLM2 (30 layers, tied, 576 wide,
# so that most rows are no multiple of 256) and random Llamas of 32 and 80 layers, untied, 256 and 288 wide.
LAYERS_WITH_MORE_BITS = {30: [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29],
                         32: [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]}  # fmt: skip
OTHERS = {"Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "BF16": "BF16"}
NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@pytest.mark.parametrize("layers", LAYERS_WITH_MORE_BITS)
@pytest.mark.parametrize("kind", merge_lora.GGUF_TYPES)
def test_the_mix_of_types_is_llama_quantizes(kind, layers):
    def chosen(name: str, layer: int = 0, width: int = 4096, tied: bool = False) -> str:
        return merge_lora.weight_type(kind, name, layer, layers, width, tied)

    most, mixed = OTHERS[kind], kind.endswith("_M")
    for name in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert {chosen(f"blk.{i}.{name}.weight", i) for i in range(layers)} == {most}
    for name in ("attn_v", "attn_qkv", "ffn_down"):
        more = [i for i in range(layers) if chosen(f"blk.{i}.{name}.weight", i) != most]
        assert more == (LAYERS_WITH_MORE_BITS[layers] if mixed else [])
        assert {chosen(f"blk.{i}.{name}.weight", i) for i in more} <= {"Q6_K"}
    head = "Q6_K" if mixed else most
    assert (chosen("output.weight"), chosen("token_embd.weight")) == (head, most)
    assert chosen("token_embd.weight", tied=True) == head
    assert chosen("output.weight", width=288) == NARROW.get(head, head)
    assert chosen("blk.9.ffn_up.weight", 9, width=288) == NARROW.get(most, most)
    assert chosen("blk.9.ffn_up.weight", 9, width=40) == ("BF16" if kind == "BF16" else "F16")


def test_values_of_a_70b_get_more_bits():
    kinds = [
        merge_lora.weight_type("Q4_K_M", f"blk.11.{name}.weight", 11, 80, 8192, False) for name in ("attn_v", "attn_k")
    ]
    assert kinds == ["Q5_K", "Q4_K"]
    assert merge_lora.weight_type("Q4_K_M", "blk.12.attn_v.weight", 12, 80, 8192, False) == "Q6_K"


# ---- a running Ollama ----

RECORDED = json.loads((ROOT / "tests" / "ollama_answers.json").read_text())


@pytest.fixture
def ollama(monkeypatch):
    """A stand-in that answers as the recorded server, and counts: it is told what to render and how many tokens."""
    state = {"chats": {}, "stop": "stop"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply, status = RECORDED["unknown model"], 404
            if asked["model"] == "ada":
                text, count = state["chats"][json.dumps(asked["messages"])]
                reply, status = RECORDED["answer"] | {"prompt_eval_count": count, "done_reason": state["stop"]}, 200
                if asked.get("_debug_render_only"):
                    reply = RECORDED["render"] | {"_debug_info": {"rendered_template": text}}
            body = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()


def test_check_ollama(short_smollm2, tmp_path, capsys, ollama, monkeypatch):
    adapter = random_adapter(short_smollm2, tmp_path / "adapter")
    edit_json(adapter / "training_args.json", data={"system": "Tu es Dolores."})
    merged = merge(adapter, tmp_path / "merged", "--gguf", "none")
    tokenizer, check = AutoTokenizer.from_pretrained(merged), ["--check-ollama", "ada", "--output", str(merged)]
    for chat in merge_lora.CHECKED_CHATS:
        turns = [("system", "Tu es Dolores."), *((turn["role"], turn["content"]) for turn in chat)]
        text = "".join(f"<|{role}|>\n{said}{'<|im_end|>' * (role == 'assistant')}\n" for role, said in turns)
        text += "<|assistant|>\n"
        ollama["chats"][json.dumps(chat)] = text, len(tokenizer(text).input_ids)
    assert len(ollama["chats"]) == 12
    capsys.readouterr()
    assert merge_lora.main(check) == 0 and "12 chats" in capsys.readouterr().out

    ollama["stop"] = "length"
    assert merge_lora.main(check) == 1 and "no answer ends" in capsys.readouterr().out
    ollama["stop"], last = "stop", json.dumps(merge_lora.CHECKED_CHATS[-1])
    text, count = ollama["chats"][last]
    for wrong in ((text + " ", count), (text, count - 1)):
        ollama["chats"][last] = wrong
        assert merge_lora.main(check) == 1
        assert repr(wrong[0]) in (printed := capsys.readouterr().out) and str(wrong[1]) in printed
    with pytest.raises(merge_lora.InputError, match="model 'nope' not found"):
        merge_lora.main(["--check-ollama", "nope", *check[2:]])
    with pytest.raises(merge_lora.InputError, match="no merged model"):
        merge_lora.main([*check[:3], str(tmp_path)])
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:1")
    with pytest.raises(merge_lora.InputError, match="OLLAMA_HOST"):
        merge_lora.main(check)


def test_counts_of_a_real_ollama(smollm2_tokenizer):
    """Recorded from Ollama 0.33: its prompt_eval_count is the number of ids that training computes."""
    for text, count in RECORDED["counts"]:
        assert len(smollm2_tokenizer(text).input_ids) == count, text


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


def test_chat_stops_at_a_role_tag_and_shows_control_characters(smollm2_tokenizer, capsys):
    streamer = merge_lora.answer_streamer(smollm2_tokenizer, ["<|eot_id|>", "<|user|>"])
    streamer.on_finalized_text("Oui\x1b[2J.\n<|user|>\nEt <|eot_id|>", stream_end=True)
    assert streamer.answer == "Oui\x1b[2J.\n" and capsys.readouterr().out == "Oui\\x1b[2J.\n\n"


def test_chat_without_a_model(tmp_path):
    done = run("--chat", tmp_path / "none", input="")
    assert (
        (done.returncode, done.stdout) == (2, "") and f"{tmp_path}/none" in done.stderr and done.stderr.count("\n") == 1
    )


def test_help_waits_for_no_library():
    code = "import sys, merge_lora; assert not {'torch', 'transformers', 'gguf', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    shown = run("--help").stdout
    for word in ("runs_dolores_v5/llama31_clean", "dolores_v5_full", "--overwrite"):
        assert word in shown
    assert "None" not in shown and shown.count("\n  python3 merge_lora.py") == 4  # four examples


# ---- what is refused: one line, before anything is written ----


def refused(adapter: Path, tmp_path: Path, *parts: str, options=()):
    """InputError in one line that holds these parts, and nothing is left."""
    before = set(tmp_path.iterdir())
    with pytest.raises(merge_lora.InputError) as error:
        merge(adapter, tmp_path / "refused", *options)
    line = str(error.value)
    assert all(part in line for part in parts), line
    assert "\n" not in line and "; " in line and set(tmp_path.iterdir()) == before


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
        (["my_run"], "unexpected argument my_run; did you mean --adapter my_run?"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, line, capsys):
    with pytest.raises(SystemExit) as ended:
        merge_lora.parse_args(flags)
    assert (ended.value.code, capsys.readouterr().err) == (2, f"merge_lora.py: {line}; see --help\n")


@pytest.mark.parametrize("name", [*merge_lora.CHECKPOINT_FILES, *merge_lora.RUN_FILES])
def test_a_missing_adapter_file(copy, tmp_path, name):
    (copy / name).unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    refused(copy, tmp_path, f"{copy}/{name}", "missing", "train_sft_dolores.py")
    (copy / "checkpoint-7").mkdir()
    refused(copy, tmp_path, f"{copy}/{name}", "--resume", f"--adapter {copy}/checkpoint-7")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("modules_to_save", ["embed_tokens"]),
        ("bias", "all"),
        ("trainable_token_indices", [1]),
        ("something_new", {"a": 1}),
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
    ],
)
def test_settings_that_a_merge_would_lose(copy, tmp_path, setting, value):
    edit_json(copy / "adapter_config.json", **{setting: value})
    refused(copy, tmp_path, f"{copy}/adapter_config.json: {setting} is ", "merge_and_unload")


def test_an_adapter_of_the_embedding(tiny_llama31, tmp_path):
    other = random_adapter(tiny_llama31, tmp_path / "embedding", target_modules=["embed_tokens"])
    refused(other, tmp_path, "model.embed_tokens", "fits no layer of the base")


def test_another_base(copy, smollm2, tmp_path):
    refused(copy, tmp_path, "name the right --base", options=["--base", smollm2])


def test_an_adapter_file_that_is_not_the_configs(copy, tmp_path):
    tensors = load_file(copy / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, copy / "adapter_model.safetensors")
    refused(copy, tmp_path, "model.layers.1.mlp.up_proj fits no layer")
    save_file({**tensors, "base_model.model.extra.lora_A.weight": torch.ones(1)}, copy / "adapter_model.safetensors")
    refused(copy, tmp_path, "extra fits no layer")
    both = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(both, copy / "adapter_model.safetensors")
    refused(copy, tmp_path, "no adapter of model.layers.1.mlp.up_proj.weight")


def test_a_quantised_base(copy, tiny_llama31, tmp_path):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    tensors = weights(base)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4096, 1, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors")
    refused(copy, tmp_path, "model.layers.0.mlp.up_proj.weight is U8", "bf16, f16 or f32", options=["--base", base])


def test_files_that_are_cut_off(copy, tiny_llama31, tmp_path):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    with open(base / "model.safetensors", "r+b") as file:
        file.truncate(20_000_000)
    refused(copy, tmp_path, str(base), "model.safetensors is damaged or incomplete", options=["--base", base])
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n")
    refused(copy, tmp_path, str(base), "model.safetensors is damaged or incomplete", options=["--base", base])
    (base / "model.safetensors").unlink()
    refused(copy, tmp_path, f"{base}/model.safetensors", "missing", options=["--base", base])
    (copy / "training_args.json").write_text("{\n  nonsense")
    refused(copy, tmp_path, f"{copy}/training_args.json", "not JSON", "line 2")


@pytest.mark.parametrize("options", [[], ["--gguf-only"]])
def test_no_or_infinite_numbers(copy, tmp_path, options):
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, copy / "adapter_model.safetensors")
    refused(copy, tmp_path, "NaN or infinity in model.layers.1.self_attn.q_proj.weight", options=options)


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
    refused(copy, tmp_path, f"{copy}/tokenizer.json", "128256")


def test_an_end_token_that_does_not_exist(copy, tmp_path):
    edit_json(copy / "training_args.json", chat_format=chat_format("chatml", ""))
    refused(copy, tmp_path, f"{copy}/tokenizer.json", "<|im_end|>")


# ---- the base by name ----


def test_a_base_that_is_nowhere(copy, tmp_path):
    refused(copy, tmp_path, "--base ./none", "neither a folder nor a Hub name", options=["--base", "./none"])
    refused(copy, tmp_path, "--base org/none", "cannot reach", options=["--base", "org/none"])  # the tests are offline
    name_base(copy, "/gone/base", None)
    refused(copy, tmp_path, "--base /gone/base", "neither a folder nor a Hub name")


def test_the_hub_is_asked_for_the_trained_revision(copy, tiny_llama31, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, dry_run=False, **how):
        if dry_run:  # asks only for sizes
            return []
        asked.append((name, how))
        return tiny_llama31

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    name_base(copy, "org/base", "0e9e39f")
    merge(copy, tmp_path / "merged")
    merge(copy, tmp_path / "other", "--base", "org/copy")
    assert [(name, kw["revision"]) for name, kw in asked] == [("org/base", "0e9e39f"), ("org/copy", None)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepoError", "hf.co/org/base"),
        ("RepositoryNotFoundError", "not found"),
        ("RevisionNotFoundError", "no revision abc"),
    ],
)
def test_what_the_hub_says(copy, tmp_path, monkeypatch, error, said):
    import huggingface_hub

    class Response:  # as much as the error's constructor looks at
        headers, request, status_code = {}, None, 403

    def fail(*_, **__):
        raise getattr(huggingface_hub.errors, error)("long\nstory", response=Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    name_base(copy, "org/base", "abc")
    refused(copy, tmp_path, "--base org/base", said)


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
    with pytest.raises(merge_lora.InputError, match=f"cannot write into {tmp_path}/file"):
        merge(copy, tmp_path / "file" / "merged")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_mount_point_is_refused_before_the_merge(copy, tmp_path):
    """A folder next to it could not be renamed to it, nor does it lie on the same disk."""
    output = tmp_path / "full"
    output.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", output], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(merge_lora.InputError, match=f"{output}: cannot be replaced .* --output {output}/merged"):
            merge(copy, output)
        assert (merge(copy, output / "merged") / "Modelfile").is_file()
    finally:
        subprocess.run(["umount", output], check=True)


def test_a_hub_cache_that_cannot_be_written(copy, tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        Path("/sys/hub").mkdir()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    name_base(copy, "org/base", "abc")
    refused(copy, tmp_path, "--base org/base: cannot use the Hugging Face cache", "HF_HOME")


def test_a_full_disk_is_seen_before_anything_is_written(copy, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    base = Path(json.loads((copy / "training_args.json").read_text())["base"]["model"])
    weights = (base / "model.safetensors").stat().st_size
    # Q8_0 takes 34 bytes for 32 weights of two bytes; norms are few.
    for options, need in (["--gguf", "none"], weights), (["--gguf-only"], weights * 17 / 32), ([], weights * 49 / 32):
        refused(copy, tmp_path, "0.01 GB free", f"{(need + (64 << 20)) / 1e9:.2f} GB needed", options=options)


SLOW = """if True:
    import os, sys, time, merge_lora
    merged, calls = merge_lora.merged_rows, 0
    def slowly(*args):
        global calls
        calls += 1
        if calls == int(os.environ.get("MOMENT", 1)):
            print("writing", flush=True)
            time.sleep(0.5)
        yield from merged(*args)
    merge_lora.merged_rows = slowly
    sys.argv[0] = "merge_lora.py"
    sys.exit(merge_lora.run())
"""


@pytest.mark.parametrize(
    ("number", "status", "moment"),  # the base has 21 tensors: 1 is a safetensors file, 30 the GGUF
    [(signal.SIGINT, 130, 30), (signal.SIGTERM, 143, 1), (signal.SIGHUP, 129, 1), (signal.SIGKILL, -9, 30)],
    ids=str,
)
@pytest.mark.slow
def test_an_interrupted_merge(adapter, tmp_path, number, status, moment):
    output = merge(adapter, tmp_path / "merged")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # that merge ignores it at its end
    before = digests(output)
    command = [sys.executable, "-c", SLOW, "--adapter", str(adapter), "--output", str(output), "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                               env={**os.environ, "MOMENT": str(moment)})  # fmt: skip
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_during_the_merge(copy, tmp_path, number):
    code = SLOW.replace("time.sleep(0.5)", f"raise OSError({number}, os.strerror({number}), 'shard')")
    command = [sys.executable, "-c", code, "--adapter", str(copy), "--output", str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("shard: ") and done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_printed_in_any_locale_and_into_a_pipe_that_ends(tmp_path):
    """A name that the terminal, or UTF-8, does not have is escaped; `| head` ends the script quietly."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("--adapter", os.fsencode(tmp_path) + b"/caf\xe9 \xf0\x9f\x99\x82", env=env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "\\udce9 \\U0001f642" in done.stderr, done.stderr
    script = f"{shlex.quote(sys.executable)} merge_lora.py --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "141") and not done.stderr
