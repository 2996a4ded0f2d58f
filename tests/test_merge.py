"""merge_lora.py: the numbers are PEFT's, the folder is whole, and what cannot be merged is refused in one line."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import PROJECTIONS, complete_adapter, random_adapter
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


# ---- the numbers ----


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True, **RANK_PATTERN}, {"use_dora": True}], ids=["lora", "rs", "dora"]
)
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


def test_tied_embeddings_and_a_single_file(smollm2, tmp_path):
    adapter = random_adapter(smollm2, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged")
    assert_equal(weights(merged), peft_merged(smollm2, adapter))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": r".*\.1\..*_proj"}, {"layers_to_transform": [1]}],
    ids=["regex", "one layer"],
)
def test_other_targets(tiny_llama31, tmp_path, lora):
    adapter = random_adapter(tiny_llama31, tmp_path / "adapter", **lora)
    assert_equal(weights(merge(adapter, tmp_path / "merged")), peft_merged(tiny_llama31, adapter))


def test_an_adapter_saved_in_bf16_is_merged_in_fp32_as_peft_does(tiny_llama31, tmp_path):
    adapter = random_adapter(tiny_llama31, tmp_path / "adapter", dtype=torch.bfloat16)
    assert next(iter(weights(adapter).values())).dtype == torch.bfloat16
    assert_equal(weights(merge(adapter, tmp_path / "merged")), peft_merged(tiny_llama31, adapter))


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_base_weights_are_those_that_training_saw(tiny_llama31, tmp_path, double_quant):
    """Every Linear4bit counts, adapted or not: what training saw, it must have seen everywhere."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers import BitsAndBytesConfig

    adapter = random_adapter(tiny_llama31, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    edit_json(
        adapter / "training_args.json",
        quantization={"bnb_nf4": True, "bnb_dtype": "bfloat16", "bnb_double_quant": double_quant},
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    trained = AutoModelForCausalLM.from_pretrained(
        tiny_llama31, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama31, dtype=torch.bfloat16)
    seen = 0
    for name, module in trained.named_modules():
        if type(module).__name__ == "Linear4bit":
            plain.get_submodule(name).weight.data = dequantize_module_weight(module).data
            seen += 1
    assert seen == 14
    ours = weights(merge(adapter, tmp_path / "merged", "--base-weights", "nf4"))
    assert_equal(ours, peft_merged(plain, adapter))
    assert torch.equal(ours["lm_head.weight"], weights(tiny_llama31)["lm_head.weight"])
    assert not torch.equal(ours["model.layers.0.self_attn.k_proj.weight"],
                           weights(tiny_llama31)["model.layers.0.self_attn.k_proj.weight"])  # fmt: skip


def test_peak_memory_is_some_tensors_not_the_model(tiny_llama31, tmp_path):
    """A base of 1.2 GB, whose largest adapted tensor has 33 MB (fp32: 67 MB), in one file of zeros with holes."""
    config = json.loads((tiny_llama31 / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}
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
    assert at > 1.7e9
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    from peft import LoraConfig, get_peft_model

    names = get_peft_model(model, LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    lora = {n.replace(".default", ""): torch.randn(v.shape) for n, v in names.named_parameters() if "lora_" in n}
    save_file(lora, adapter / "adapter_model.safetensors")
    names.peft_config["default"].save_pretrained(adapter)
    complete_adapter(base, adapter)

    code = """if True:
        import resource, sys, merge_lora, peft, transformers
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        merge_lora.main(sys.argv[1:])
        print("grew", (peak() - before) // 1024)
    """
    command = [sys.executable, "-c", code, "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout.split("grew")[1]) < 450, done.stdout  # MiB


# ---- the folder ----


def test_the_folder_is_exactly_this(sharded, tmp_path):
    adapter = random_adapter(sharded, tmp_path / "adapter")
    (sharded / "USE_POLICY.md").write_text("policy")
    merged = merge(adapter, tmp_path / "merged")
    shards = {file.name for file in sharded.glob("*.safetensors")}
    assert {path.name for path in merged.iterdir()} == shards | {
        "Modelfile", "USE_POLICY.md", "chat_template.jinja", "config.json", "generation_config.json",
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
    assert json.loads((merged / "tokenizer_config.json").read_text()) == {
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


def test_what_is_printed(adapter, tiny_llama31, tmp_path):
    """Few lines, nothing on stderr: no warning, no progress bar."""
    done = run("--adapter", adapter, "--output", tmp_path / "merged")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"merging    {adapter} into {tiny_llama31} (0.03 GB, original weights)"
    assert lines[1].startswith(f"written    {tmp_path}/merged (0.03 GB) in ") and lines[1].endswith(" s")
    assert lines[2:] == [
        "checked    21 tensors with the base's names, shapes and dtypes, no NaN or infinity",
        "checked    28 adapter tensors used once each, in 14 layers",
        "checked    RoPE in both layouts, theta 500000, as the base; end of answer [128001, 128008, 128009]",
        f"next       ollama create dolores-v5 -f {tmp_path}/merged/Modelfile",
    ]


def test_help_waits_for_no_library():
    code = "import sys, merge_lora; assert not {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    shown = run("--help").stdout
    for word in ("runs_dolores_v5/llama31_clean", "dolores_v5_full", "(default: original)", "--overwrite", "--verify"):
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
        (["--base-weights", "int3"], "--base-weights: invalid choice: 'int3' (choose from original, nf4)"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, line, capsys):
    with pytest.raises(SystemExit) as ended:
        merge_lora.parse_args(flags)
    written = capsys.readouterr()
    said = written.err.replace("'original', 'nf4'", "original, nf4")  # Python 3.11 puts quotes there
    assert (ended.value.code, written.out, said) == (2, "", f"merge_lora.py: {line} (see --help)\n")


@pytest.mark.parametrize("name", merge_lora.ADAPTER_FILES)
def test_a_missing_adapter_file(copy, tmp_path, name):
    (copy / name).unlink()
    refused(f"{{a}}/{name}: missing; train_sft_dolores.py writes it when training has ended", copy, tmp_path)


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
    edit_json(copy / "adapter_config.json", init_lora_weights="pissa")
    line = "{a}/adapter_config.json: init_lora_weights 'pissa' has changed the base; use PEFT's own merge_and_unload"
    refused(line, copy, tmp_path)
    edit_json(copy / "adapter_config.json", peft_type="IA3")
    refused("{a}/adapter_config.json: IA3 adapter; only LoRA, rsLoRA and DoRA can be merged here", copy, tmp_path)
    other = random_adapter(tiny_llama31, tmp_path / "embedding", target_modules=["embed_tokens"])
    line = "{a}/adapter_model.safetensors: adapts model.embed_tokens, not a layer between embedding and head; use PEFT's own merge"
    refused(line, other, tmp_path)
    head = random_adapter(tiny_llama31, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    refused(line.replace("model.embed_tokens", "lm_head"), head, tmp_path)


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


def test_a_base_that_does_not_fit_although_its_config_does(copy, tiny_llama31, tmp_path):
    base = Path(shutil.copytree(tiny_llama31, tmp_path / "base"))
    edit_json(base / "config.json", intermediate_size=256)
    line = ("{a}/adapter_model.safetensors: base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight is [128, 4], "
            "the base needs [256, 4]; name the right --base")  # fmt: skip
    refused(line, copy, tmp_path, "--base", base)
    edit_json(base / "config.json", intermediate_size=128)
    tensors = weights(base)
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    refused(f"{base}: no tensor model.norm.weight in it; is it a complete model?", copy, tmp_path, "--base", base)
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors")
    line = f"{base}: model.norm.weight is [32], but config.json says [64]"
    refused(line, copy, tmp_path, "--base", base)


def test_an_adapter_file_that_is_not_the_configs(copy, tmp_path):
    tensors = load_file(copy / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, copy / "adapter_model.safetensors")
    line = f"{{a}}/adapter_model.safetensors: no {key} in it; is it complete, and does it belong to this base?"
    refused(line, copy, tmp_path)
    save_file({**tensors, "base_model.model.extra.lora_A.weight": torch.ones(1)}, copy / "adapter_model.safetensors")
    line = "{a}/adapter_model.safetensors: base_model.model.extra.lora_A.weight fits no layer of the base; name the right --base"
    refused(line, copy, tmp_path)


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
    edit_json(copy / "training_args.json", chat_format={"name": "chatml", "header": "<|im_start|>{role}\n", "turn_end": "\n",
                                                        "answer_end": "\n", "eos_token": "<|im_end|>"})  # fmt: skip
    line = "{a}/tokenizer.json: has no <|im_end|>, the chat format's end token; is it the right adapter?"
    refused(line, copy, tmp_path)


def test_nf4_weights_that_training_never_saw(copy, tmp_path):
    edit_json(copy / "training_args.json", quantization={"bnb_nf4": False})
    refused("{a}: not trained on NF4 weights; leave out --base-weights nf4", copy, tmp_path, "--base-weights", "nf4")


# ---- the base by name ----


def test_a_base_that_is_nowhere(copy, tmp_path):
    refused(
        "./none: no such base folder; --base takes a folder or a Hugging Face id", copy, tmp_path, "--base", "./none"
    )
    line = "org/none: not in the cache, and cannot reach the Hugging Face Hub; name a local folder with --base"
    refused(line, copy, tmp_path, "--base", "org/none")  # the tests are offline
    edit_json(copy / "training_args.json", base={"model": "/gone/base", "revision": None})
    refused("/gone/base: no such base folder; name it with --base", copy, tmp_path)


def test_the_hub_is_asked_for_the_trained_revision(copy, tiny_llama31, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or tiny_llama31
    )
    edit_json(copy / "training_args.json", base={"model": "org/base", "revision": "0e9e39f"})
    merge(copy, tmp_path / "merged")
    merge(copy, tmp_path / "other", "--base", "org/copy")
    assert [(name, kw["revision"]) for name, kw in asked] == [("org/base", "0e9e39f"), ("org/copy", None)]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("GatedRepoError", "org/base: gated; accept its licence on huggingface.co/org/base, then `hf auth login`"),
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
    edit_json(copy / "training_args.json", base={"model": "org/base", "revision": "abc"})
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


def test_a_full_disk_is_seen_before_anything_is_written(copy, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    size = (merge_lora.read_adapter(copy).training["base"]["model"], "model.safetensors")
    need = (Path(*size).stat().st_size + (64 << 20)) / 1e9
    line = f"{tmp_path}: 0.01 GB free, {need:.2f} GB needed; make room or choose another --output"
    refused(line, copy, tmp_path)


SLOW = """if True:
    import sys, time, merge_lora
    write = merge_lora.write_bytes
    def slowly(*args):
        print("writing", flush=True)
        time.sleep(0.5)
        write(*args)
    merge_lora.write_bytes = slowly
    sys.argv[0] = "merge_lora.py"
    sys.exit(merge_lora.run())
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=str
)
def test_an_interrupted_merge(adapter, tmp_path, number, status):
    output = merge(adapter, tmp_path / "merged")
    before = digests(output)
    command = [sys.executable, "-c", SLOW, "--adapter", str(adapter), "--output", str(output), "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline().startswith("merging") and process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status and digests(output) == before
    if number == signal.SIGKILL:  # no time to clean up: the next run does
        assert {path.name for path in tmp_path.iterdir()} == {"merged", "merged.partial"}
        merge(adapter, output, "--overwrite")
    else:
        assert stderr == "stopped; the partial output was deleted, an earlier merge is unchanged\n"
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


def test_killed_between_the_two_renames(adapter, tmp_path):
    output = merge(adapter, tmp_path / "merged")
    before = digests(output)
    output.rename(tmp_path / "merged.old")
    (tmp_path / "merged.partial").mkdir()
    with pytest.raises(merge_lora.InputError, match="already exists"):  # it is back before anything else happens
        merge_lora.main(["--adapter", str(adapter), "--output", str(output)])
    assert digests(output) == before


def test_a_disk_that_fills_up_underway(copy, tmp_path):
    code = SLOW.replace("time.sleep(0.5)", "raise OSError(28, 'No space left on device', 'shard')")
    command = [sys.executable, "-c", code, "--adapter", str(copy), "--output", str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "shard: No space left on device; the output folder is unchanged\n")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# ---- verification on demand ----


def short_text(folder: Path) -> Path:
    (folder / "text.txt").write_text("La mer monte deux fois par jour, et personne ne s'en étonne plus.")
    return folder / "text.txt"


def test_verify_passes_a_right_merge_and_says_so(smollm2, tmp_path, capsys):
    adapter = random_adapter(smollm2, tmp_path / "adapter", scale=0.03)
    merge(adapter, tmp_path / "merged", "--verify", short_text(tmp_path))
    out = capsys.readouterr().out
    assert "checked    KL " in out and "top-1 agreement" in out


@pytest.mark.parametrize("fault", ["forgotten", "twice", "other base weights"])
def test_verify_fails_loudly(smollm2, tmp_path, tmp_path_factory, monkeypatch, fault):
    adapter = random_adapter(smollm2, tmp_path / "adapter", scale=0.03)
    right = merge_lora.merge_with_peft
    wrong = {
        "forgotten": lambda layer, weight: weight,
        "twice": lambda layer, weight: (lambda once: once + (once - weight))(right(layer, weight.clone())),
        "other base weights": lambda layer, weight: right(
            layer, merge_lora.quantize_and_restore(weight, merge_lora.NF4(torch.bfloat16, True))
        ),
    }
    monkeypatch.setattr(merge_lora, "merge_with_peft", wrong[fault])
    text = () if fault == "forgotten" else (short_text(tmp_path_factory.mktemp("text")),)  # once the text of its own
    with pytest.raises(merge_lora.VerificationFailed, match=r"the merged model is not base \+ adapter: KL "):
        merge(adapter, tmp_path / "merged", "--verify", *text)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_verify_reads_its_text_first(copy, tmp_path):
    line = f"{tmp_path}/none.txt: No such file or directory; name a readable file"
    refused(line, copy, tmp_path, "--verify", tmp_path / "none.txt")
