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
from itertools import count
from pathlib import Path

import pytest
import torch
from engine import PROJECTIONS, fingerprint, random_adapter, read_gguf, to_gguf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_lora

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sharded(tiny_llama31, tmp_path_factory) -> Path:
    """tiny_llama31 in several shards with Meta's policy, as the real one comes."""
    folder = tmp_path_factory.mktemp("sharded")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama31, dtype="auto")
    model.save_pretrained(folder, max_shard_size="10MB")
    shutil.copytree(tiny_llama31, folder, ignore=shutil.ignore_patterns("model.safetensors"), dirs_exist_ok=True)
    (folder / "USE_POLICY.md").write_text("policy")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture(scope="module")
def llama_adapter(tiny_llama31, tmp_path_factory) -> Path:
    return random_adapter(tiny_llama31, tmp_path_factory.mktemp("llama") / "adapter")


@pytest.fixture(scope="module")
def process(llama_adapter, sharded) -> subprocess.CompletedProcess:
    """The whole script, as a user starts it: Llama 3.1 in shards, every file."""
    return run("--adapter", llama_adapter, "--base", sharded, "--output", llama_adapter.parent / "merged")


@pytest.fixture(scope="module")
def merged(process, llama_adapter) -> Path:
    """What that process wrote."""
    return llama_adapter.parent / "merged"


@pytest.fixture(scope="module")
def small_adapter(short_smollm2, tmp_path_factory) -> Path:
    return random_adapter(short_smollm2, tmp_path_factory.mktemp("small") / "adapter")


@pytest.fixture
def adapter(small_adapter, tmp_path) -> Path:
    """An adapter of short_smollm2, whose merge takes a fifth of tiny_llama31's time; a test may spoil it."""
    return Path(shutil.copytree(small_adapter, tmp_path / "adapter"))


@pytest.fixture
def base(short_smollm2, tmp_path) -> Path:
    """A copy of short_smollm2 that a test may spoil."""
    return Path(shutil.copytree(short_smollm2, tmp_path / "base"))


def merge(adapter: Path, output: Path, *options) -> Path:
    merge_lora.main(["--adapter", str(adapter), "--output", str(output), *map(str, options)])
    return output


def run(*arguments, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "merge_lora.py"), *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_merged_as_by_peft(ours: dict[str, torch.Tensor], base: Path, adapter: Path):
    """Bit for bit what PEFT's merge_and_unload makes of the base, in which nothing but all projections has changed."""
    before, model = weights(base), AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    assert ours.keys() == before.keys()  # a tied head is not stored
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
        assert torch.equal(value, before[name]) == (name.split(".")[-2] not in PROJECTIONS), name


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def edit_json(file: Path, **changes):
    file.write_text(json.dumps(read(file) | changes))


def name_base(adapter: Path, model: str, revision: str | None = None):
    """The record with another name of the base, and its weights as they were."""
    file = adapter / "training_args.json"
    edit_json(file, base=read(file)["base"] | {"model": model, "revision": revision})


# ---- the numbers ----


def test_bit_for_bit_what_peft_merges(merged, sharded, llama_adapter):
    assert_merged_as_by_peft(weights(merged), sharded, llama_adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_pieces_of_a_weight_are_merged_as_the_whole(dtype, base, short_smollm2, tmp_path, monkeypatch):
    """In blocks of 16 rows, each with its own rows of the adapter; an adapter in bf16 is merged in fp32, as PEFT does."""
    monkeypatch.setattr(merge_lora, "BLOCK", 1)
    AutoModelForCausalLM.from_pretrained(short_smollm2, dtype=dtype).save_pretrained(base)
    adapter = random_adapter(base, tmp_path / "adapter", dtype=torch.bfloat16)
    assert {value.dtype for value in weights(base).values()} == {dtype}
    assert_merged_as_by_peft(weights(merge(adapter, tmp_path / "merged", "--gguf", "none")), base, adapter)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_model(llama_adapter, tmp_path, monkeypatch):
    """A base of 33 MB, and one of 0.6 GB, whose largest tensors have 263 MB; safetensors and GGUF."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import merge as benchmark

    monkeypatch.setitem(benchmark.SHAPE, "hidden_size", 1024)
    benchmark.make_base(tmp_path / "base", 2)
    benchmark.make_adapter(tmp_path / "base", tmp_path / "adapter")
    peaks = []
    for adapter in (llama_adapter, tmp_path / "adapter"):
        command = [sys.executable, str(ROOT / "merge_lora.py"), "--adapter", str(adapter), "--overwrite"]
        code, _, peak = benchmark.llama.measured([*command, "--output", str(tmp_path / "merged")], tmp_path / "log")
        assert code == 0, (tmp_path / "log").read_text()
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 0.2, peaks  # GiB; the embedding alone would take 0.24, in float32 0.49


# ---- the base of the training ----


def test_the_fingerprint_as_it_is_defined(tiny_llama31, sharded):
    """The definition, spelt out a second way: adapters trained earlier must be merged later, from one file or several."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(tiny_llama31).items()):
        digest.update(f"{name} BF16 {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes()[:4096])
    assert fingerprint(tiny_llama31) == fingerprint(sharded) == digest.hexdigest()


def test_a_base_with_other_weights_is_refused_unless_forced(adapter, base, tmp_path):
    tensors = weights(base)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refused(adapter, tmp_path, str(base), "weights differ", "--base", "--force", options=["--base", base])
    forced = merge(adapter, tmp_path / "forced", "--base", base, "--force", "--gguf", "none")
    assert_merged_as_by_peft(weights(forced), base, adapter)


def test_a_base_from_the_hub(adapter, short_smollm2, tmp_path, monkeypatch):
    """Asked for the revision of the training, unless --base names another; the card says what was merged."""
    asked = []

    def download(name, dry_run=False, **how):
        if not dry_run:  # which asks only for sizes
            asked.append((name, how["revision"]))
        return [] if dry_run else short_smollm2

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    name_base(adapter, "meta-llama/Llama-3.1-8B-Instruct", "0e9e39f")
    merged = merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "other", "--base", "org/copy", "--gguf", "none")
    assert asked == [("meta-llama/Llama-3.1-8B-Instruct", "0e9e39f"), ("org/copy", None)]

    front, text = card(merged)
    assert front == {"base_model": "meta-llama/Llama-3.1-8B-Instruct", "library_name": "transformers",
                     "pipeline_tag": "text-generation"}  # fmt: skip
    assert "`meta-llama/Llama-3.1-8B-Instruct` at revision `0e9e39f` (bfloat16)" in text
    assert "**Built with Llama.**" in text and "@" not in text and str(tmp_path) not in text
    assert "ollama create dolores-v5 -f merged/Modelfile" in text and "vLLM" in text


def test_a_checkpoint_is_merged_with_the_runs_record(adapter, short_smollm2, tmp_path):
    """During training, when the run has no config.json yet."""
    checkpoint = adapter / "checkpoint-20"
    checkpoint.mkdir()
    for name in merge_lora.CHECKPOINT_FILES:
        shutil.move(adapter / name, checkpoint / name)
    (adapter / "config.json").unlink()
    merged = merge(checkpoint, tmp_path / "merged", "--gguf", "none")
    assert_merged_as_by_peft(weights(merged), short_smollm2, checkpoint)
    (adapter / "training_args.json").unlink()
    refused(checkpoint, tmp_path, f"{adapter}/training_args.json", "missing")


# ---- the folder ----


def test_what_is_printed(process, merged):
    """Few lines, nothing on stderr: no warning, no progress bar."""
    assert (process.returncode, process.stderr) == (0, "")
    names = [line[:10].strip() for line in process.stdout.splitlines()]
    assert names == ["merging", "written", "checked", "checked", "checked", "next"]
    assert process.stdout.splitlines()[-1] == f"next       ollama create dolores-v5 -f {merged}/Modelfile"


def test_the_folder_is_exactly_this(merged, sharded, llama_adapter):
    shards = {file.name for file in sharded.glob("*.safetensors")}
    assert {path.name for path in merged.iterdir()} == shards | {
        "Modelfile", "README.md", "USE_POLICY.md", "chat_template.jinja", "config.json", "dolores-v5-Q8_0.gguf",
        "generation_config.json", "model.safetensors.index.json", "params", "template", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert all(path.is_file() and not path.is_symlink() for path in merged.iterdir())
    for name, source in (("tokenizer.json", sharded), ("model.safetensors.index.json", sharded),
                         ("chat_template.jinja", llama_adapter)):  # fmt: skip
        assert (merged / name).read_bytes() == (source / name).read_bytes()
    for name in ("config.json", "generation_config.json"):  # whoever reads the base reads the merge
        assert read(merged / name) == read(sharded / name)
    for name in shards:  # the header, and with it all offsets, are the base's
        theirs = (sharded / name).read_bytes()
        length = 8 + int.from_bytes(theirs[:8], "little")
        assert (merged / name).read_bytes()[:length] == theirs[:length]


LLAMAS = [128001, 128008, 128009]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(LLAMAS, LLAMAS), ([128001, 128008], LLAMAS), (128001, [128001, 128009]), (128009, 128009), (None, LLAMAS)],
)
def test_generation_config_keeps_the_list_and_holds_the_trained_end(tmp_path, theirs, ours):
    settings = {} if theirs is None else {"temperature": 0.6, "eos_token_id": theirs}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": LLAMAS}))
    if settings:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert merge_lora.generation_config(tmp_path, 128009) == settings | {"eos_token_id": ours}


def test_tokenizer_config_is_for_old_readers_too(llama_adapter, llama31_tokenizer, tmp_path):
    adapter = Path(shutil.copytree(llama_adapter, tmp_path / "adapter"))
    own = {"pad_token": "<|finetune_right_pad_id|>", "model_max_length": 131072, "bos_token": "<|begin_of_text|>"}
    new = {"backend": "tokenizers", "is_local": True, "local_files_only": True, "chat_template": "{% if tools %}tool"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(own | new | {"extra_special_tokens": ["<|eom_id|>"]}))
    merged = merge(adapter, tmp_path / "merged", "--gguf", "none")
    written = read(merged / "tokenizer_config.json")
    added = written.pop("added_tokens_decoder")
    assert len(added) == 256 and added["128009"]["content"] == "<|eot_id|>" and added["128009"]["special"]
    assert written == own | {
        "add_bos_token": True, "eos_token": "<|eot_id|>", "additional_special_tokens": ["<|eom_id|>"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = "L'été, ça va ? 🙂 <|eot_id|>\n\n12345"
    assert tokenizer(text).input_ids == llama31_tokenizer(text).input_ids
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}]).input_ids
    assert chat[0] == 128000 and chat.count(128000) == 1 and tokenizer.pad_token_id == 128004


def test_the_name_is_in_the_command_the_card_and_the_file(adapter, tmp_path, capsys):
    edit_json(adapter / "training_args.json", args={"name": "marmiton"})
    for name, options in (("marmiton", []), ("me/chef-2.1", ["--overwrite", "--name", "me/chef-2.1"])):
        merged = merge(adapter, tmp_path / "my cook", "--gguf-only", *options)
        command = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
        assert command == ["ollama", "create", name, "-f", f"{merged}/Modelfile"]
        text, file = (merged / "README.md").read_text(), f"{name.split('/')[-1]}-Q8_0.gguf"
        assert f"\n# {name}\n" in text and f"ollama create {name} -f 'my cook'/Modelfile" in text and file in text
        assert name.encode() in (merged / file).read_bytes()[:1000]  # general.name
        assert (merged / "Modelfile").read_text().startswith(f"FROM ./{file}\n")


def card(merged: Path) -> tuple[dict, str]:
    """The front matter as the Hub reads it, and the text."""
    from huggingface_hub import ModelCard

    read = ModelCard.load(merged / "README.md")
    return read.data.to_dict(), read.text


def test_which_bases_are_metas_llama(tmp_path):
    """By their name, or by the license that came with them."""
    assert merge_lora.is_metas_llama("meta-llama/Meta-Llama-3-8B", tmp_path)
    (tmp_path / "LICENSE").write_text("Apache License")
    assert not merge_lora.is_metas_llama("TinyLlama/TinyLlama-1.1B-Chat-v1.0", tmp_path)
    (tmp_path / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT")
    assert merge_lora.is_metas_llama("/models/base", tmp_path)


PLAIN = 'Tu es « Dolores ».\nTu dis "oui"\t{{ .Role }} \\n et "\''


@pytest.mark.parametrize(
    ("system", "written", "said"),
    [
        (PLAIN, PLAIN, ["system", "is in the Modelfile"]),
        ("Qui\u00a0?\u3000!\u2028", "Qui ? ! ", ["U+00A0 NO-BREAK SPACE", "U+3000 IDEOGRAPHIC SPACE", "U+2028"]),
        ("👩\u200d👧\u00ad\ufeff\x07\ue000", "👩👧", ["ZERO WIDTH JOINER", "SOFT HYPHEN", "U+FEFF", "U+0007"]),
        ('a """ b', None, ["warning", '"""', "/set system"]),
    ],
    ids=["plain", "spaces", "dropped", "quotes"],
)
def test_what_ollama_would_drop_of_a_system_turn_is_named(capsys, system, written, said):
    assert merge_lora.ollama_system(system) == written
    printed = capsys.readouterr().out
    assert all(words in printed for words in said) and ("warning" in printed) == (written != system)


def test_what_the_hub_hands_to_ollama(adapter, tmp_path):
    """`ollama run hf.co/…` reads template, params and system: what the Modelfile says."""
    edit_json(adapter / "training_args.json", data={"system": PLAIN})
    merged = merge(adapter, tmp_path / "merged", "--gguf", "none")
    modelfile, params = (merged / "Modelfile").read_text(), read(merged / "params")
    assert f'TEMPLATE """{(merged / "template").read_text()}"""' in modelfile
    assert (merged / "system").read_text() == PLAIN and modelfile.endswith(f'\nSYSTEM """{PLAIN}"""\n')
    stops = [f'stop "{stop}"' for stop in params.pop("stop")]
    assert [f"PARAMETER {line}" for line in [*(f"{k} {v}" for k, v in params.items()), *stops]] == [
        line for line in modelfile.splitlines() if line.startswith("PARAMETER")
    ]
    front, text = card(merged)
    assert "vLLM" in text and "ollama create" not in text  # what is not in the folder is not in the card
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation"}  # a local base has no link
    assert "Built with Llama" not in text and "license of the base model applies" in text


# ---- the GGUF ----


def test_the_gguf_is_what_llama_cpps_converter_makes_of_the_folder(adapter, tmp_path):
    """Every tensor and every key, but for those that come from the folder's name and card."""
    merged = merge(adapter, tmp_path / "merged")
    our_keys, ours = read_gguf(merged / "dolores-v5-Q8_0.gguf")
    their_keys, theirs = read_gguf(to_gguf(merged, tmp_path / "theirs.gguf", "q8_0"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type and (tensor.data == theirs[name].data).all(), name
    different = {key for key in our_keys | their_keys if our_keys.get(key) != their_keys.get(key)}
    assert all(key.startswith(("general.", "GGUF.")) for key in different), different


def test_without_safetensors_the_gguf_is_the_same(llama_adapter, merged, tmp_path):
    """And without shards: the adapter's own base is one file."""
    alone, name = merge(llama_adapter, tmp_path / "alone", "--gguf-only"), "dolores-v5-Q8_0.gguf"
    assert (merged / name).read_bytes() == (alone / name).read_bytes()
    left = {file.name for file in merged.iterdir()} - {file.name for file in alone.iterdir()}
    assert left == {"USE_POLICY.md", "model.safetensors.index.json", *(f.name for f in merged.glob("*.safetensors"))}
    text = card(alone)[1]
    assert "ollama create" in text and ".gguf" in text and "vLLM" not in text
    with pytest.raises(merge_lora.InputError, match="no safetensors"):
        merge_lora.main(["--chat", str(alone)])


def test_a_base_that_the_converter_does_not_know(adapter, tmp_path, capsys, monkeypatch):
    """The safetensors are still written, unless they were not wanted."""
    from conversion.base import TextModel

    def unknown(*_):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")

    monkeypatch.setattr(TextModel, "get_vocab_base_pre", unknown)
    merged = merge(adapter, tmp_path / "merged")
    printed = capsys.readouterr().out
    assert "warning    no GGUF" in printed and "not recognized" in printed and "ollama create" not in printed
    assert not list(merged.glob("*.gguf")) and (merged / "model.safetensors").is_file()
    assert (merged / "Modelfile").read_text().startswith("FROM .\n")
    refused(adapter, tmp_path, "--gguf-only", "not recognized", options=["--gguf-only"])


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


@pytest.mark.parametrize(("name", "layer", "kind"), [("attn_v", 11, "Q5_K"), ("attn_k", 11, "Q4_K"), ("attn_v", 12, "Q6_K")])  # fmt: skip
def test_values_of_a_70b_get_more_bits(name, layer, kind):
    assert merge_lora.weight_type("Q4_K_M", f"blk.{layer}.{name}.weight", layer, 80, 8192, False) == kind


# ---- a running Ollama ----

RECORDED = read(ROOT / "tests" / "ollama_answers.json")


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


def test_check_ollama(adapter, tmp_path, capsys, ollama, monkeypatch):
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
    for text, tokens in RECORDED["counts"]:
        assert len(smollm2_tokenizer(text).input_ids) == tokens, text


# ---- chat in the terminal ----

PROMPT = "<|system|>\nTu es Dolores.\n<|user|>\nQui es-tu ?\n<|assistant|>\n"


@pytest.fixture
def chat_adapter(adapter) -> Path:
    edit_json(adapter / "training_args.json", data={"system": "Tu es Dolores."})
    return adapter


@pytest.fixture
def asked(monkeypatch, smollm2_tokenizer) -> list[tuple[str, dict]]:
    """(prompt, settings) of each answer; they have at most eight tokens."""
    from transformers import GenerationMixin

    generate, seen = GenerationMixin.generate, []

    def watched(self, **settings):
        seen.append((smollm2_tokenizer.decode(settings["input_ids"][0]), settings))
        return generate(self, **settings)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    monkeypatch.setattr(merge_lora, "CHAT_TOKENS", 8)
    return seen


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_chat_in_a_terminal(chat_adapter, asked, monkeypatch, capsys, number, status):
    """With an adapter. Ctrl-C ends an answer, and what was written of it is in the history; SIGTERM ends the chat."""
    from transformers import TextStreamer

    lines, put = iter(["Qui es-tu ?", "Et moi ?", ""]), TextStreamer.put
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin", typed := io.TextIOWrapper(io.BytesIO()))
    typed.isatty = lambda: True

    def interrupted(self, value):
        put(self, value)
        if len(asked) == 1 and len(self.token_cache) == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    torch.manual_seed(0)
    assert merge_lora.run(["--chat", str(chat_adapter)]) == status
    opening, system, answers, answer, *_ = capsys.readouterr().out.split("\n")
    assert "Ctrl-C ends an answer" in opening and "Tu es Dolores." in system and "0.7" in answers
    prompt, settings = asked[0]
    assert prompt == PROMPT and settings["temperature"] == 0.7
    assert settings["stop_strings"] == ["<|im_end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    history = f"{PROMPT}{answer.strip()}<|im_end|>\n<|user|>\nEt moi ?\n<|assistant|>\n"
    assert answer.strip() and [prompt for prompt, _ in asked[1:]] == ([] if status else [history])


def test_chat_asks_the_questions_of_a_file_one_by_one(chat_adapter, asked, tmp_path, monkeypatch, capsys):
    """With a merged folder. Each is a conversation of its own; an empty line ends nothing, nor do bytes that are no text."""
    folder = merge(chat_adapter, tmp_path / "merged", "--gguf", "none")
    typed = io.BytesIO(b"Qui es-tu ?\n\nEt ch\xe9ri ?\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, "utf-8"))
    capsys.readouterr()
    with merge_lora.trainer.any_terminal():
        merge_lora.main(["--chat", str(folder)])
    blocks = capsys.readouterr().out.removeprefix("\n> ").split("\n> ")
    questions, answers = zip(*(block.split("\n", 1) for block in blocks), strict=True)
    assert questions == ("Qui es-tu ?", "Et ch\ufffdri ?") and all(map(str.strip, answers))
    assert [prompt for prompt, _ in asked] == [PROMPT, PROMPT.replace("Qui es-tu", "Et ch\ufffdri")]


def test_chat_stops_at_a_role_tag_and_shows_control_characters(smollm2_tokenizer, capsys):
    streamer = merge_lora.answer_streamer(smollm2_tokenizer, ["<|eot_id|>", "<|user|>"])
    streamer.on_finalized_text("Oui\x1b[2J.\n<|user|>\nEt <|eot_id|>", stream_end=True)
    assert streamer.answer == "Oui\x1b[2J.\n" and capsys.readouterr().out == "Oui\\x1b[2J.\n\n"


# ---- the command line ----


def test_help_waits_for_no_library():
    code = "import sys, merge_lora; assert not {'torch', 'transformers', 'gguf', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    shown = run("--help").stdout
    for word in ("runs_dolores_v5/llama31_clean", "dolores_v5_full", "--overwrite"):
        assert word in shown
    assert "None" not in shown and shown.count("\n  python3 merge_lora.py") == 4  # four examples


def test_one_line_and_exit_status_2_in_any_locale(tmp_path):
    """A name that the terminal, or UTF-8, does not have is escaped."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("--adapter", os.fsencode(tmp_path) + b"/caf\xe9 \xf0\x9f\x99\x82", env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(rf"{tmp_path}/caf\udce9 \U0001f642: no such folder; train one with"), done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--over", "unknown option --over; did you mean --overwrite?"),  # no abbreviations
        ("my_run", "unexpected argument my_run; did you mean --adapter my_run?"),
        ("--gguf-only --gguf none", "--gguf-only"),
        ("--name 'chef de cuisine'", "--name"),  # as Ollama refuses them
        ("--name me.you/mine", "--name"),
        ("--name a/b/c", "--name"),
        (f"--name {'a' * 81}", "--name"),
        ("--name ''", "--name"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        merge_lora.parse_args(shlex.split(flags))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"merge_lora.py: {said}") and error.count("\n") == 1


# ---- what is refused: one line, before anything is written ----


def refused(adapter: Path, tmp_path: Path, *parts: str, options=(), output="refused"):
    """InputError in one line that holds these parts, and nothing is left."""
    before = set(tmp_path.iterdir())
    with pytest.raises(merge_lora.InputError) as error:
        merge(adapter, tmp_path / output, *options)
    line = str(error.value)
    assert all(part in line for part in parts), line
    assert "\n" not in line and "; " in line and set(tmp_path.iterdir()) == before


def test_a_missing_adapter_file(adapter, tmp_path):
    for name in (*merge_lora.CHECKPOINT_FILES, *merge_lora.RUN_FILES):
        hidden = (adapter / name).rename(tmp_path / "hidden")
        refused(adapter, tmp_path, f"{adapter}/{name}: missing", "--resume", f"--adapter {adapter}/checkpoint-10")
        hidden.rename(adapter / name)
    (adapter / "checkpoint-10").rmdir()
    (adapter / "config.json").unlink()
    refused(adapter, tmp_path, f"{adapter}/config.json: missing", "train_sft_dolores.py")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("modules_to_save", ["embed_tokens"]),
        ("something_new", {"a": 1}),
        ("use_dora", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
    ],
)
def test_settings_that_a_merge_would_lose(adapter, tmp_path, setting, value):
    edit_json(adapter / "adapter_config.json", **{setting: value})
    refused(adapter, tmp_path, f"{adapter}/adapter_config.json: {setting} is ", "merge_and_unload")


def test_an_adapter_that_does_not_fit_the_base(adapter, tiny_llama31, tmp_path):
    file = adapter / "adapter_model.safetensors"
    tensors, module = load_file(file), "model.layers.1.mlp.up_proj"
    save_file({k: v for k, v in tensors.items() if k != f"base_model.model.{module}.lora_A.weight"}, file)
    refused(adapter, tmp_path, f"{module} fits no layer")
    save_file({**tensors, "base_model.model.extra.lora_A.weight": torch.ones(1)}, file)
    refused(adapter, tmp_path, "extra fits no layer")
    save_file({k: v for k, v in tensors.items() if module not in k}, file)
    refused(adapter, tmp_path, f"no adapter of {module}.weight")
    save_file(tensors, file)
    refused(adapter, tmp_path, "name the right --base", options=["--base", tiny_llama31])


def test_a_tokenizer_that_does_not_fit_the_base(adapter, tmp_path):
    tokenizer = read(adapter / "tokenizer.json")
    added = [*tokenizer["added_tokens"], {**tokenizer["added_tokens"][-1], "id": 49152, "content": "<|new|>"}]
    edit_json(adapter / "tokenizer.json", added_tokens=added)
    refused(adapter, tmp_path, f"{adapter}/tokenizer.json", "49152")
    chat_format = read(adapter / "training_args.json")["chat_format"]
    edit_json(adapter / "training_args.json", chat_format=chat_format | {"eos_token": "<|eot_id|>"})
    refused(adapter, tmp_path, f"{adapter}/tokenizer.json", "<|eot_id|>")


def test_a_quantised_base(adapter, base, tmp_path):
    quantised = torch.zeros(4096, 1, dtype=torch.uint8)
    save_file(weights(base) | {"model.layers.0.mlp.up_proj.weight": quantised}, base / "model.safetensors")
    said = ("model.layers.0.mlp.up_proj.weight is U8", "bf16, f16 or f32")
    refused(adapter, tmp_path, *said, options=["--base", base])


def test_files_that_are_cut_off(adapter, base, tmp_path):
    file = base / "model.safetensors"
    os.truncate(file, 10_000_000)
    refused(adapter, tmp_path, str(base), "model.safetensors is damaged or incomplete", options=["--base", base])
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n")
    refused(adapter, tmp_path, str(base), "model.safetensors is damaged or incomplete", options=["--base", base])
    file.unlink()
    refused(adapter, tmp_path, str(base), "no model.safetensors", options=["--base", base])
    (adapter / "training_args.json").write_text("{\n  nonsense")
    refused(adapter, tmp_path, f"{adapter}/training_args.json", "not JSON", "line 2")


def test_no_or_infinite_numbers(adapter, base, tmp_path):
    """In the adapter, or in a tensor of the base that has none; without safetensors, or without GGUF."""
    tensors = weights(base)
    tensors["model.embed_tokens.weight"][-1, -1] = float("-inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said, options = "NaN or infinity in model.embed_tokens.weight", ["--base", base, "--force", "--gguf", "none"]
    refused(adapter, tmp_path, said, options=options)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(adapter, tmp_path, "NaN or infinity in model.layers.1.self_attn.q_proj.weight", options=["--gguf-only"])


def test_a_base_that_is_nowhere(adapter, tmp_path):
    refused(adapter, tmp_path, "--base ./none", "neither a folder nor a Hub name", options=["--base", "./none"])
    refused(adapter, tmp_path, "--base org/none", "cannot reach", options=["--base", "org/none"])  # tests are offline
    name_base(adapter, "/gone/base")
    refused(adapter, tmp_path, "--base /gone/base", "neither a folder nor a Hub name")


def test_what_the_hub_says(adapter, tmp_path, monkeypatch):
    """Other answers: test_cli.py."""
    from huggingface_hub.errors import RevisionNotFoundError

    class Response:  # as much as the error's constructor looks at
        headers, request, status_code = {}, None, 404

    def fails_with(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)

    name_base(adapter, "org/base", "abc")
    fails_with(RevisionNotFoundError("long\nstory", response=Response()))
    refused(adapter, tmp_path, "--base org/base", "no revision abc")
    fails_with(PermissionError(errno.EACCES, "Permission denied", "/hub"))
    refused(adapter, tmp_path, "--base org/base: cannot use the Hugging Face cache", "HF_HOME")


# ---- nothing half done ----


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_an_existing_output_is_replaced_only_when_asked(adapter, short_smollm2, tmp_path):
    (tmp_path / "merged").mkdir()  # an empty folder is no loss
    output = merge(adapter, tmp_path / "merged")
    before = digests(output)
    other = random_adapter(short_smollm2, tmp_path / "other", seed=1)
    refused(other, tmp_path, "already exists; choose another --output", "--overwrite", output="merged")
    assert digests(output) == before
    (output / "stale.safetensors").write_text("left from yesterday")
    merge(other, output, "--overwrite")
    assert digests(output).keys() == before.keys() and digests(output) != before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged", "other"}


def test_overwrite_spares_what_is_no_merge(adapter, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    said = "not created by merge_lora.py; refusing to overwrite it"
    refused(adapter, tmp_path, said, options=["--overwrite"], output="precious")
    assert (tmp_path / "precious/thesis.txt").read_text() == "years of work"
    for output in ("adapter", "."):
        refused(adapter, tmp_path, "which is still needed", "--output", options=["--overwrite"], output=output)
    (tmp_path / "file").write_text("not a folder")
    refused(adapter, tmp_path, f"cannot write into {tmp_path}/file", output="file/merged")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_mount_point_is_refused_before_the_merge(adapter, tmp_path):
    """A folder next to it could not be renamed to it, nor does it lie on the same disk."""
    output = tmp_path / "full"
    output.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", output], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        refused(adapter, tmp_path, f"{output}: cannot be replaced", f"--output {output}/merged", output="full")
    finally:
        subprocess.run(["umount", output], check=True)


def test_a_full_disk_is_seen_before_anything_is_written(adapter, short_smollm2, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    size = (short_smollm2 / "model.safetensors").stat().st_size
    # Q8_0 takes 34 bytes for 32 weights of two bytes; norms are few.
    for options, need in (["--gguf", "none"], size), (["--gguf-only"], size * 17 / 32), ([], size * 49 / 32):
        refused(adapter, tmp_path, "0.01 GB free", f"{(need + (64 << 20)) / 1e9:.2f} GB needed", options=options)


@pytest.fixture
def at_tensor(monkeypatch):
    """A function that does something when the merge begins with its nth tensor."""
    merged_rows = merge_lora.merged_rows

    def patch(moment: int, action):
        calls = count(1)

        def rows(*args):
            if next(calls) == moment:
                action()
            yield from merged_rows(*args)

        monkeypatch.setattr(merge_lora, "merged_rows", rows)

    return patch


@pytest.mark.parametrize(
    ("number", "status", "moment"),  # the base has 20 tensors: 1 is in a safetensors file, 30 in the GGUF
    [(signal.SIGINT, 130, 30), (signal.SIGTERM, 143, 1), (signal.SIGHUP, 129, 1)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_an_interrupted_merge(adapter, tmp_path, at_tensor, capsys, number, status, moment):
    output = merge(adapter, tmp_path / "merged")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # that merge ignores it at its end
    before, seen = digests(output), []

    def stop():
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        os.kill(os.getpid(), number)

    at_tensor(moment, stop)
    assert merge_lora.run(["--adapter", str(adapter), "--output", str(output), "--overwrite"]) == status
    assert capsys.readouterr().err == "stopped; nothing was changed\n" and digests(output) == before
    assert seen == [[".merged.merging", "adapter", "merged"]]
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}


def test_what_a_killed_merge_leaves(adapter, tmp_path):
    """An unfinished folder, and between the two renames the earlier merge under another name."""
    output = merge(adapter, tmp_path / "merged", "--gguf", "none")
    before = digests(output)
    output.rename(tmp_path / ".merged.replaced")
    shutil.copytree(adapter, tmp_path / ".merged.merging")
    with pytest.raises(merge_lora.InputError, match="already exists"):  # it is back before anything else happens
        merge(adapter, output)
    assert digests(output) == before
    merge(adapter, output, "--overwrite", "--gguf", "none")
    assert digests(output) == before and {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}


def test_a_disk_that_fails_during_the_merge(adapter, tmp_path, at_tensor, capsys):
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

    at_tensor(1, fail)
    assert merge_lora.run(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("shard: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
