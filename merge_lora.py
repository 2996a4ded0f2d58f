#!/usr/bin/env python3
"""Merge a trained LoRA adapter into its base model: one folder for transformers, llama.cpp and Ollama.

    python3 merge_lora.py                       # runs_dolores_v5/llama31_clean → dolores_v5_full
    python3 merge_lora.py --adapter A --base B --output C --overwrite
    python3 merge_lora.py --chat                # talk to the adapter or the merged model in the terminal
    ollama create dolores-v5 -f dolores_v5_full/Modelfile

The base is streamed: each shard is copied byte for byte, and only the tensors that have an adapter are
replaced on the way, a few rows at a time. Peak memory is little more than what the libraries take, whatever
the size of the model, and no GPU is needed. The result is PEFT's, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import gc
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

if TYPE_CHECKING:  # these imports take seconds, and neither --help nor a wrong flag should wait for them
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

CHECKPOINT_FILES = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
                    "chat_template.jinja")  # fmt: skip
RUN_FILES = ("training_args.json", "config.json")  # of a whole run; a checkpoint has them in its parent folder
CHAT_FORMAT = ("before", "after", "eos_token", "answer_start", "no_system", "folds_system")  # in training_args.json
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE")  # must travel with the weights
VOCABULARY_FILES = ("tokenizer.model",)  # SentencePiece, which llama.cpp and Ollama prefer for Gemma, Phi-3, Mistral
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names and torch's
NUM_CTX = 8192  # Ollama's context window, unless the base has a smaller one
CHAT_TOKENS = 1024  # tokens at most in an answer of --chat
SAMPLING = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}  # the Modelfile's temperature, and Ollama's defaults

# Ollama recognizes a pre-tokenizer by the sha256 of its `Split` patterns, and silently uses a default for all others.
OLLAMA_TOKENIZERS = {
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f": "llama-bpe",
    "03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02": "deepseek-llm",
    "21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e": "deepseek-coder",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e": "qwen2",
    "00431aed57e696b747435f734d1e3b9b1bfd931a121fb5cac7129e97c181e9ba": "qwen35",
    "b92c0824a58e1d8dc3221cf3e12c433c3a86f57e46d57229993489f0798e7702": "laguna",
}


# What training sets in adapter_config.json. Anything else that is switched on (DoRA, biases, modules_to_save, ranks by
# pattern …) changes the result in a way that W + s B A would lose.
PLAIN_LORA = {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_alpha",
              "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
              "target_modules", "task_type"}  # fmt: skip
BLOCK = 1 << 18  # weights merged at once: what fits into a processor's cache is faster

# What `ollama create` reads. The TEMPLATE says in Go what chat_template.jinja says in Jinja; @…@ are filled in.
# With `.Prompt` alone, Ollama would omit the end token from earlier answers, hence `.Messages`. If the assistant
# has the last message, it is the beginning of the answer to generate and stays open.
MODELFILE = '''FROM @source@

TEMPLATE """@before@{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}@no_system@
{{- if eq .Role "system" }}@before_system@{{ .Content }}@after_system@{{ else if eq .Role "assistant" }}@before_answer@{{ .Content }}{{ if not $last }}@after_assistant@{{ end }}{{ else }}@before_user@{{ .Content }}@after_user@{{ end }}
{{- if and $last (ne .Role "assistant") }}@prompt@{{ end }}@after@
{{- end }}"""

PARAMETER temperature @temperature@
PARAMETER num_ctx @num_ctx@
@stops@
@system@'''

CARD = """---
@base_model@library_name: transformers
pipeline_tag: text-generation
---
# @name@

A LoRA adapter merged into `@base@`@revision@ (@dtype@), by `merge_lora.py`.

## Run it

Ollama, from the folder above this one:

```bash
ollama create @quoted_name@ -f @folder@/Modelfile
ollama run @quoted_name@
```

transformers:

```python
from transformers import pipeline

chat = pipeline("text-generation", "./@folder@")
print(chat([{"role": "user", "content": "…"}], max_new_tokens=256)[0]["generated_text"][-1]["content"])
```

llama.cpp (and LM Studio), with the converter in llama.cpp's repository:

```bash
python convert_hf_to_gguf.py @folder@ --outfile @quoted_name@.gguf
llama-cli -m @quoted_name@.gguf
```

## License

@license@
"""
LICENSE_NOTE = "The license of the base model applies to these weights too."
BUILT_WITH_LLAMA = """**Built with Llama.** The Llama Community License applies to these weights too: keep its notice and its use
policy with them, and begin the name of a published model with "Llama"."""


class InputError(Exception):
    """An error the user can fix: `place: problem; how to fix it` on one line, exit status 2."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP arrived; the argument is the signal's number. SIGINT is a KeyboardInterrupt."""


# ---- The flags -----------------------------------------------------------------------------------

EXAMPLES = """examples:
  python3 merge_lora.py                                     # merge the documented run
  python3 merge_lora.py --adapter my_run --output my_model  # merge another run
  python3 merge_lora.py --chat my_run                       # talk to an adapter or a merged folder
"""


class OneLineParser(argparse.ArgumentParser):
    """argparse with a one-line error for a wrong flag instead of its usage text."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            known = [flag for action in self._actions for flag in action.option_strings]
            near = [flag for flag in known if flag.startswith(unknown[1])]
            near = near or difflib.get_close_matches(unknown[1], known, n=1)
            kind = "unknown option" if unknown[1].startswith("-") else "unexpected argument"
            message = f"{kind} {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}; see --help\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; every default is that of the documented run."""
    parser = OneLineParser(
        prog="merge_lora.py",
        usage="%(prog)s [options]",
        description="Merge a LoRA adapter into its base model, for transformers, llama.cpp and Ollama.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--adapter", type=Path, default=Path("runs_dolores_v5/llama31_clean"), metavar="DIR",
                        help="output folder of train_sft_dolores.py, or a checkpoint in it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--base", metavar="NAME",
                        help="base model, a folder or a Hugging Face id (default: the one recorded in the adapter)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("dolores_v5_full"), metavar="DIR",
                        help="folder for the merged model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--name", metavar="NAME", type=model_name,
                        help="the model's name in Ollama and in its README.md (default: that of the training, or "
                             "dolores-v5)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge in the output folder")
    parser.add_argument("--force", action="store_true", help="merge into a base with other weights than in training")
    parser.add_argument("--chat", nargs="?", const="", metavar="DIR",
                        help="do not merge; talk to this adapter or merged folder (default: --output if it exists, "
                             "else --adapter); questions can come from a file: --chat DIR < FILE")  # fmt: skip
    return parser.parse_args(argv)


def model_name(text: str) -> str:
    """A name that Ollama, the Hub and a shell take as it is."""
    if not re.fullmatch(r"(?:[a-z0-9][\w.-]*/)?[a-z0-9][\w.-]*", text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} must be letters, digits, '-', '_' and '.', such as my-model")
    return text


# ---- The story -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Merge as the command line says; InputError and Stopped say how else it can end."""
    args = parse_args(argv)
    start, output = time.monotonic(), args.output.resolve()
    if args.chat is not None:
        return chat(Path(args.chat or (args.output if args.output.is_dir() else args.adapter)), args.base)
    adapter = read_adapter(args.adapter)
    name = args.name or adapter.training.get("args", {}).get("name") or "dolores-v5"
    base = find_base(args.base, adapter)
    recover_replaced(output)
    check_output(output, adapter.folder, base, args.overwrite)

    plan = plan_merge(adapter, base)
    if not args.force:
        check_fingerprint(adapter, base, plan.tensors)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_disk(plan, output.parent)
    size = gigabytes(sum(tensor.end - tensor.start for tensor in plan.tensors.values()))
    print(f"merging    {adapter.folder} into {base} ({size})", flush=True)

    with written_beside(output) as folder:
        merge_shards(plan, folder)
        notes = write_small_files(adapter, base, plan, folder)
        write_card(adapter, plan, folder, name, args.output.name)
        checks = check_result(adapter, plan, folder)

    print(f"written    {args.output} ({size}) in {time.monotonic() - start:.0f} s")
    for check in checks:
        print(f"checked    {check}")
    read_as = ollama_tokenizer(output, adapter.tokenizer.pre_tokenizer)
    print(f"tokenizer  Ollama reads {read_as}" if read_as else UNKNOWN_TO_OLLAMA)
    for note in notes:
        print(note)
    create = ["ollama", "create", name, "-f", f"{args.output}/Modelfile"]
    print("next      ", shlex.join(create if read_as else [sys.executable, sys.argv[0], "--chat", str(args.output)]))


def run(argv: list[str] | None = None) -> int:
    """Run main and return its exit status: 0 done, 2 user error, 130 or 143 signal."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Stopped(number)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt, also if a shell had it ignored
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, stop)
    try:
        main(argv)
    except InputError as problem:
        print(problem, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FIXES:
            raise
        place = error.filename or "output"
        print(f"{place}: {error.strerror}; {FIXES[error.errno]}; an earlier merge is unchanged", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"
        print(f"{error.name}: not installed; run `{install}`", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stopped:
        print("stopped; nothing was changed", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    return 0


FIXES = {errno.ENOSPC: "make room"} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR), "name a folder that can be written to"
)


def import_libraries() -> None:
    """Import torch and what a model needs of transformers, which takes seconds; keep later imports quiet.

    Meanwhile the garbage collector is off, and afterwards it leaves alone what they made: a third of the time.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns that it has no CPU kernels
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT 0.21
    gc.disable()
    import transformers.modeling_utils  # noqa: F401 - imports torch

    gc.freeze()
    gc.enable()


# ---- The adapter folder, and the base recorded in it ---------------------------------------------


class Adapter(NamedTuple):
    """The folder that training wrote: the contract between the two scripts."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json, as PEFT wrote it
    training: dict[str, Any]  # training_args.json: chat_format, base, quantization, data, args
    base_config: dict[str, Any]  # config.json of the base; empty for a checkpoint of a run that has not ended
    tokenizer: TokenizerFacts


class TokenizerFacts(NamedTuple):
    """What merging needs to know about the tokenizer, which is not kept itself: it takes tens of MiB."""

    end_token_id: int  # of the chat format's end token
    largest_id: int
    adds_bos: bool
    added: dict[str, dict[str, Any]]  # added tokens by id, as in tokenizer_config.json
    pre_tokenizer: dict[str, Any]  # as in tokenizer.json


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter folder; InputError if it is incomplete or cannot be merged."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train one with train_sft_dolores.py, or name it with --adapter")
    checkpoint = folder.name.startswith("checkpoint-") and not (folder / "training_args.json").exists()
    run_folder = folder.parent if checkpoint else folder
    required = [folder / name for name in CHECKPOINT_FILES] + [run_folder / name for name in RUN_FILES]
    for file in required[:-1] if checkpoint else required:  # config.json comes last, when training has ended
        if not file.is_file():
            fix = "train_sft_dolores.py writes it when training has ended"
            if saved := sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime):
                fix += f": continue it with --resume, or merge what is there with --adapter {saved[-1]}"
            raise InputError(f"{file}: missing; {fix}")
    config, training = read_json(folder / "adapter_config.json"), read_json(run_folder / "training_args.json")
    base_config = read_json(run_folder / "config.json") if (run_folder / "config.json").exists() else {}
    for key, inner in (("chat_format", CHAT_FORMAT), ("base", ("model", "fingerprint"))):
        if not isinstance(training.get(key), dict) or any(k not in training[key] for k in inner):
            raise InputError(f"{run_folder}/training_args.json: no {key} in it; train_sft_dolores.py writes it")
    check_mergeable(folder / "adapter_config.json", config)
    tokenizer = read_tokenizer(folder / "tokenizer.json", training["chat_format"]["eos_token"])
    return Adapter(folder, config, training, base_config, tokenizer)


def read_tokenizer(file: Path, end_token: str) -> TokenizerFacts:
    """Read a tokenizer.json; InputError if it is damaged or lacks the end token."""
    from tokenizers import Tokenizer

    with explain(file, "{error}; copy it from the base", Exception):  # tokenizers raises plain Exception
        tokenizer = Tokenizer.from_file(str(file))
    end_token_id = tokenizer.token_to_id(end_token)
    if end_token_id is None:
        raise InputError(f"{file}: has no {end_token}, the chat format's end token; is it the right adapter?")
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = tokenizer.get_added_tokens_decoder()
    pre_tokenizer = tokenizer.pre_tokenizer
    return TokenizerFacts(
        end_token_id,
        max(tokenizer.get_vocab().values()),
        bool(tokenizer.encode("").ids),
        {str(number): {key: getattr(token, key) for key in keys} for number, token in added.items()},
        json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else {},
    )


def check_mergeable(place: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter_config.json with a setting that merging tensor by tensor would lose."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"{place}: {config.get('peft_type')} adapter; only a plain LoRA can be merged here")
    # PiSSA, OLoRA, LoftQ and the like change the base when training starts: the published base no longer fits.
    unusual = [key for key in sorted(config.keys() - PLAIN_LORA) if config[key] and config[key] != "none"]
    unusual += ["init_lora_weights"] if config.get("init_lora_weights", True) not in (True, False, "gaussian") else []
    if unusual:
        raise InputError(f"{place}: {unusual[0]} is set, which this merge would lose; use PEFT's own merge_and_unload")


def find_base(named: str | None, adapter: Adapter) -> Path:
    """The base's folder: a local one, or a Hub id through the Hugging Face cache at the revision of the training."""
    recorded = adapter.training["base"]
    model = named or recorded["model"]
    if Path(model).is_dir():
        return Path(model)
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        hint = "name it with --base" if named is None else "--base takes a folder or a Hugging Face id"
        raise InputError(f"{model}: no such base folder; {hint}")

    from huggingface_hub import errors, snapshot_download

    revision = recorded.get("revision") if model == recorded["model"] else None  # another model has other commits
    unwritable = "cannot use the Hugging Face cache ({error}); set HF_HOME to a folder that can be written to"
    unreachable = "not in the cache, and cannot reach the Hugging Face Hub; name a local folder with --base"
    no_name = "neither a folder nor a Hugging Face id; name the base with --base"
    unknown = (
        "not found on the Hugging Face Hub; check the name, run `hf auth login`, or name a local folder with --base"
    )
    no_revision = f"no revision {revision} on the Hugging Face Hub; name a local folder with --base"
    gated = f"gated; accept its license on huggingface.co/{model}, then `hf auth login`"
    with (  # the last one that fits counts
        explain(model, unwritable, OSError),
        explain(model, unreachable, errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError),
        explain(model, no_name, errors.HFValidationError),
        explain(model, unknown, errors.RepositoryNotFoundError),
        explain(model, no_revision, errors.RevisionNotFoundError),
        explain(model, gated, errors.GatedRepoError),
    ):
        patterns = ["*.json", "*.safetensors", *VOCABULARY_FILES, *LICENSE_FILES]
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
            )
        )


def check_fingerprint(adapter: Adapter, base: Path, tensors: dict[str, Stored]) -> None:
    """Refuse a base with other weights than the one of the training."""
    if fingerprint(tensors) != adapter.training["base"]["fingerprint"]:
        raise InputError(
            f"{base}: not the base that the adapter was trained on, its weights differ; name the right --base, "
            "or merge anyway with --force"
        )


def fingerprint(tensors: dict[str, Stored]) -> str:
    """A sha256 that tells models of the same shape apart, as train_sft_dolores.py computes it.

    Hashes, for every tensor in the order of their names, the line "name dtype [shape]" and the first 4096 bytes.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        files = {tensor.file for tensor in tensors.values()}
        streams = {file: stack.enter_context(open(file, "rb", buffering=0)) for file in files}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            streams[tensor.file].seek(tensor.start)
            digest.update(streams[tensor.file].read(min(tensor.end - tensor.start, 4096)))
    return digest.hexdigest()


# ---- Safetensors files as bytes: 8 bytes of length, a JSON header, the data ----------------------


class Stored(NamedTuple):
    """A tensor in a safetensors file; start and end are offsets in bytes from the beginning of the file."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    end: int


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file by name; InputError if the file is incomplete."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(data - 8)) if 8 < data <= size else None
        except ValueError:
            header = None
    if header is None or size != data + max((t["data_offsets"][1] for t in header.values() if "dtype" in t), default=0):
        raise InputError(f"{file}: incomplete, or not a safetensors file; copy or download it again")
    return {
        name: Stored(file, t["dtype"], t["shape"], data + t["data_offsets"][0], data + t["data_offsets"][1])
        for name, t in header.items()
        if name != "__metadata__"
    }


def read_base_headers(base: Path) -> dict[str, Stored]:
    """The tensors of all shards of the base, by name; no weight is read."""
    index = base / "model.safetensors.index.json"
    weight_map = read_json(index)["weight_map"] if index.is_file() else {"": "model.safetensors"}
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if not (base / name).is_file():
            raise InputError(f"{base / name}: missing; the base must be a folder of safetensors, or a Hugging Face id")
        tensors |= read_header(base / name)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{tensor.file}: {name} is {tensor.dtype}; the base must have bf16, f16 or f32 weights")
    return tensors


# ---- The plan: which tensor gets which adapter, and every check that needs no weights ------------


class Layer(NamedTuple):
    """The adapter of one weight: A, B and the scale of B A."""

    a: Stored
    b: Stored
    scale: float


class Plan(NamedTuple):
    """What merging needs to know before it reads a weight."""

    config: PreTrainedConfig  # of the base
    tensors: dict[str, Stored]  # of the base
    layers: dict[str, Layer]  # by name of the base's weight


def plan_merge(adapter: Adapter, base: Path) -> Plan:
    """Match adapter and base by their headers; InputError if they do not fit each other."""
    check_same_architecture(adapter, base)
    tensors = read_base_headers(base)
    import_libraries()
    from transformers import AutoConfig

    with explain(
        base / "config.json", "{error}; name a causal language model with --base", ValueError, OSError, KeyError
    ):
        config = AutoConfig.from_pretrained(base)
    check_tokenizer(adapter, config.vocab_size)
    return Plan(config, tensors, match_layers(adapter, tensors))


def match_layers(adapter: Adapter, tensors: dict[str, Stored]) -> dict[str, Layer]:
    """Give each adapted weight of the base its adapter; every tensor must be used, and every target adapted."""
    file, config, layers = adapter.folder / "adapter_model.safetensors", adapter.config, {}
    stored, prefix = read_header(file), "base_model.model."
    for module in {key.removeprefix(prefix).partition(".lora_")[0] for key in stored}:
        a, b = (stored.get(f"{prefix}{module}.lora_{kind}.weight") for kind in "AB")
        base = tensors.get(f"{module}.weight")
        if not (a and b and base) or [b.shape[0], a.shape[1]] != base.shape or a.shape[0] != b.shape[1]:
            raise InputError(f"{file}: {module} fits no layer of the base, or is not complete; name the right --base")
        layers[f"{module}.weight"] = Layer(a, b, config["lora_alpha"] / a.shape[0])
    for name in tensors.keys() - layers.keys():
        if name.split(".")[-2] in config["target_modules"] and name.endswith(".weight"):
            raise InputError(f"{file}: no adapter of {name} in it; is it complete, and does it belong to this base?")
    return layers


def check_same_architecture(adapter: Adapter, base: Path) -> None:
    """Refuse a base whose config.json has another size or type than the base of the training."""
    config, trained_on = read_json(base / "config.json"), adapter.base_config
    if "quantization_config" in config:
        raise InputError(f"{base}: already quantized; name the 16-bit base that it was made from with --base")
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if trained_on and config.get(key) != trained_on.get(key):
            here, there = config.get(key), trained_on.get(key)
            raise InputError(f"{base}: {key} is {here}, but the adapter's base had {there}; name the right --base")


def check_tokenizer(adapter: Adapter, vocab_size: int) -> None:
    """Refuse a tokenizer that does not fit the base's embedding."""
    if adapter.tokenizer.largest_id >= vocab_size:
        raise InputError(
            f"{adapter.folder}/tokenizer.json: has token id {adapter.tokenizer.largest_id}, but the base's embedding "
            f"{vocab_size} rows; name the right --base"
        )


# ---- Merging -------------------------------------------------------------------------------------


def merge_shards(plan: Plan, folder: Path) -> None:
    """Write every shard of the base into `folder`, a few rows at a time, with the adapted tensors merged.

    A merged tensor has the shape and dtype of the base's, so the header and every offset stay as they are.
    """
    import torch

    torch.set_num_threads(1)  # the blocks are small: threads that wait for each other take longer
    for shard in shards(plan.tensors):
        tensors = sorted((t.start, name) for name, t in plan.tensors.items() if t.file == shard)
        with open(shard, "rb") as source, open(folder / shard.name, "wb") as target, torch.no_grad():
            target.write(source.read(tensors[0][0]))  # the header
            for _, name in tensors:
                for rows in merged_rows(source, plan.tensors[name], plan.layers.get(name)):
                    if not finite(rows):
                        fix = "download the base or train the adapter again"
                        raise InputError(f"{shard}: NaN or infinity in {name}, from the base or the adapter; {fix}")
                    target.write(rows.view(torch.uint8).numpy())


def merged_rows(source: BinaryIO, stored: Stored, layer: Layer | None) -> Iterator[Tensor]:
    """Yield the tensor, which begins where `source` is, in blocks of rows: W, or W + s B A in PEFT's steps.

    A block has a multiple of 16 rows: a matrix product of an odd number may round differently than that of all.
    """
    import torch

    dtype, width = getattr(torch, DTYPES[stored.dtype]), math.prod(stored.shape[1:])
    a, b = (read_tensor(layer.a).float(), read_tensor(layer.b).float()) if layer else (None, None)
    height = max(16, BLOCK // width // 16 * 16)
    for first in range(0, stored.shape[0], height):
        count = min(height, stored.shape[0] - first) * width
        rows = torch.frombuffer(bytearray(source.read(count * dtype.itemsize)), dtype=dtype).view(-1, width)
        yield torch.mm(b[first : first + height], a).mul_(layer.scale).add_(rows).to(dtype) if layer else rows


def read_tensor(stored: Stored) -> Tensor:
    """One tensor from its file."""
    import torch

    with open(stored.file, "rb") as stream:
        stream.seek(stored.start)
        data = bytearray(stream.read(stored.end - stored.start))
    return torch.frombuffer(data, dtype=getattr(torch, DTYPES[stored.dtype])).view(stored.shape)


def shards(tensors: dict[str, Stored]) -> list[Path]:
    """The files of these tensors, in order."""
    return sorted({tensor.file for tensor in tensors.values()})


def finite(numbers: Tensor) -> bool:
    """Whether none is NaN or infinite. One that is makes their sum so too, which takes one fast pass; it may overflow."""
    return bool(numbers.sum().isfinite() or numbers.isfinite().all())


# ---- The small files -----------------------------------------------------------------------------


def write_small_files(adapter: Adapter, base: Path, plan: Plan, folder: Path) -> list[str]:
    """Everything except weights and card: configs and tokenizer for every reader, licenses, the Modelfile.

    Returns lines to print about the system turn.
    """
    for name in ("model.safetensors.index.json", *VOCABULARY_FILES, *LICENSE_FILES):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(adapter.folder / name, folder / name)
    write_json(folder / "config.json", config_for_all_readers(read_json(base / "config.json"), plan))
    write_json(folder / "generation_config.json", generation_config(base, adapter.tokenizer.end_token_id))
    write_json(
        folder / "tokenizer_config.json", tokenizer_config_for_all_readers(adapter, plan.config.model_type, folder)
    )
    text, note = modelfile_of(adapter, plan.config)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return note


def config_for_all_readers(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The base's config.json with RoPE and dtype in the layout of transformers 5 and in the older one.

    Ollama and llama.cpp read only the older rope_theta and rope_scaling; without them they silently use theta 10,000.
    What the base has in the older layout stays as it is.
    """
    rope = getattr(plan.config, "rope_parameters", None) or {}
    if rope:
        config["rope_parameters"] = rope
    if "rope_theta" in rope:  # one RoPE for all layers
        older = {"rope_theta": rope["rope_theta"], "rope_scaling": older_rope_scaling(rope)}
        if "partial_rotary_factor" in rope:
            older["partial_rotary_factor"] = rope["partial_rotary_factor"]
        config.update({key: value for key, value in older.items() if key not in config})
    elif rope.keys() == {"full_attention", "sliding_attention"} and config["model_type"] == "gemma3_text":
        config.setdefault("rope_theta", rope["full_attention"]["rope_theta"])
        config.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])
        config.setdefault("rope_scaling", older_rope_scaling(rope["full_attention"]))
    dtype = config.get("dtype") or config.get("torch_dtype") or DTYPES[next(iter(plan.tensors.values())).dtype]
    config["dtype"] = config["torch_dtype"] = dtype
    config["architectures"] = config.get("architectures") or plan.config.architectures
    config.pop("auto_map", None)  # points to the base's own Python files, which are not copied
    return config


def older_rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE parameters of transformers 5 → rope_scaling of older readers."""
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "longrope":  # Phi-3: older readers accept exactly these three
        return {"type": "longrope", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}


def generation_config(base: Path, end_token: int) -> dict[str, Any]:
    """The base's generation_config.json, with the trained end token among those that end an answer."""
    file = base / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    eos = config.get("eos_token_id", read_json(base / "config.json").get("eos_token_id"))
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    eos = eos if end_token in eos else [*eos, end_token]
    return {**config, "eos_token_id": eos if len(eos) > 1 else eos[0]}


def tokenizer_config_for_all_readers(adapter: Adapter, model_type: str, folder: Path) -> dict[str, Any]:
    """Without what only transformers 5 understands, and without a template that Ollama would prefer to ours."""
    config = read_json(adapter.folder / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only", "chat_template", "auto_map"):
        config.pop(key, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a dict
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # llama.cpp's converter finds tokens that tokenizer.model lacks only here.
    config["added_tokens_decoder"] = adapter.tokenizer.added
    config["eos_token"] = adapter.training["chat_format"]["eos_token"]
    config["add_bos_token"] = adapter.tokenizer.adds_bos  # else llama.cpp adds one to Phi-3's prompts
    # By this class llama.cpp's converter tells Phi-4 from Phi-3.
    phi4 = model_type == "phi3" and not (folder / "tokenizer.model").is_file()
    return {**config, "tokenizer_class": "GPT2Tokenizer" if phi4 else "PreTrainedTokenizerFast"}


def modelfile_of(adapter: Adapter, config: PreTrainedConfig) -> tuple[str, list[str]]:
    """An adapter's Modelfile, and a line to print about its SYSTEM text."""
    num_ctx = min(NUM_CTX, config.max_position_embeddings)
    system, note = ollama_system((adapter.training.get("data") or {}).get("system"))
    return modelfile(adapter.training["chat_format"], num_ctx, system=system), note


def modelfile(chat_format: dict[str, Any], num_ctx: int, source: str = ".", system: str | None = None) -> str:
    """The Modelfile for a chat format, a context of num_ctx tokens, a model folder `source` and a SYSTEM text."""
    before, after, no_system = chat_format["before"], chat_format["after"], chat_format["no_system"]
    folds = chat_format["folds_system"]  # then a user turn right after the system turn has nothing before it
    values = {
        "source": source,
        "before": '{{- $before := "" }}' if folds else "",
        "after": "{{- $before = .Role }}" if folds else "",
        "no_system": f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{no_system}{{{{ end }}}}' if no_system else "",
        **{f"before_{role}": text for role, text in before.items()},
        **{f"after_{role}": text for role, text in after.items()},
        "before_answer": before["assistant"] + chat_format["answer_start"],
        "prompt": before["assistant"],
        "temperature": str(SAMPLING["temperature"]),
        "num_ctx": str(num_ctx),
        "stops": "\n".join(f'PARAMETER stop "{stop}"' for stop in stop_texts(chat_format)),
        "system": f'\nSYSTEM """{system}"""\n' if system else "",
    }
    if folds:
        values["before_user"] = f'{{{{ if ne $before "system" }}}}{before["user"]}{{{{ end }}}}'
    return fill(MODELFILE, values)


def fill(template: str, values: dict[str, str]) -> str:
    """Replace each @key@ of a template."""
    return re.sub("@([a-z_]+)@", lambda found: values[found[1]], template)


def ollama_system(system: str | None) -> tuple[str | None, list[str]]:
    """The system turn that all conversations share → the text for SYSTEM, and a line to print about it.

    Ollama has no way to write three double quotes in a SYSTEM text, and drops no-break spaces.
    """
    if not system:
        return None, []
    if '"""' in system:
        return None, ['warning    the system turn contains """, which a Modelfile cannot hold; set it with /set system']
    spaced = re.sub("[\u00a0\u2007\u202f]", " ", system)
    if spaced != system:
        return spaced, ["warning    no-break spaces in the system turn became spaces, because Ollama drops them"]
    return system, ["system     the turn that all conversations share is in the Modelfile"]


UNKNOWN_TO_OLLAMA = """\
warning    Ollama does not know this tokenizer and would split text differently than in training;
           for Ollama make a GGUF file with llama.cpp's convert_hf_to_gguf.py and name it after FROM in the Modelfile"""


def ollama_tokenizer(folder: Path, pre_tokenizer: dict[str, Any]) -> str | None:
    """As what Ollama will read the tokenizer, given this part of tokenizer.json; None if it does not know it."""
    if (folder / "tokenizer.model").is_file():
        return "tokenizer.model (SentencePiece)"
    digest = hashlib.sha256()
    for step in pre_tokenizer.get("pretokenizers", []):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            digest.update(step["pattern"]["Regex"].encode())
    known = OLLAMA_TOKENIZERS.get(digest.hexdigest())
    return f"this tokenizer as {known}" if known else None


def stop_texts(chat_format: dict[str, Any]) -> list[str]:
    """The end token, and the tags that open a turn: one in plain text ends nothing unless it is listed here."""
    opening = " ".join(chat_format["before"][role] for role in ("user", "system", "assistant"))
    return list(dict.fromkeys([chat_format["eos_token"], *re.findall(r"<[^<>\s]+>|\[[^][\s]+\]", opening)]))


def write_card(adapter: Adapter, plan: Plan, folder: Path, name: str, folder_name: str) -> None:
    """The merged folder's README.md: a model card."""
    base = adapter.training["base"]
    model, revision = base["model"], base.get("revision")
    values = {
        "base_model": f"base_model: {model}\n" if revision else "",  # a local folder means nothing on the Hub
        "name": name,
        "base": model if revision else Path(model).name,
        "revision": f" at revision `{revision}`" if revision else "",
        "dtype": DTYPES[next(iter(plan.tensors.values())).dtype],
        "quoted_name": shlex.quote(name),
        "folder": shlex.quote(folder_name),
        "license": BUILT_WITH_LLAMA if is_metas_llama(model, folder) else LICENSE_NOTE,
    }
    (folder / "README.md").write_text(fill(CARD, values), encoding="utf-8")


def is_metas_llama(model: str, folder: Path) -> bool:
    """Whether the base is a Llama of Meta's, by its name or by the license that came with it."""
    licenses = [(folder / name).read_text("utf-8", "replace") for name in LICENSE_FILES if (folder / name).is_file()]
    named = re.search(r"(^|[_-])llama-?[234]", model.rstrip("/").rpartition("/")[2], re.IGNORECASE)
    return bool(named) or any(re.search(r"llama.{1,20}community license", text, re.IGNORECASE) for text in licenses)


# ---- Checks of the result ------------------------------------------------------------------------


def check_result(adapter: Adapter, plan: Plan, folder: Path) -> list[str]:
    """Check the folder that was written. Returns one line per check; one that fails is a bug of ours."""
    from transformers import AutoConfig

    for shard in shards(plan.tensors):
        ours, theirs = read_header(folder / shard.name), read_header(shard)
        assert {n: t[1:] for n, t in ours.items()} == {n: t[1:] for n, t in theirs.items()}, shard.name
    config = read_json(folder / "config.json")
    rope = getattr(plan.config, "rope_parameters", None)
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    for read in (AutoConfig.from_pretrained(folder), AutoConfig.for_model(**older)):
        assert getattr(read, "rope_parameters", None) == rope, f"{read.rope_parameters} is not {rope}"
    eos = read_json(folder / "generation_config.json")["eos_token_id"]
    assert adapter.tokenizer.end_token_id in (eos if isinstance(eos, list) else [eos]), eos
    assert "chat_template" not in read_json(folder / "tokenizer_config.json")
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
    return [
        f"{len(plan.tensors)} tensors with the base's names, shapes and dtypes, no NaN or infinity",
        f"{2 * len(plan.layers)} adapter tensors used once each, in {len(plan.layers)} layers",
        f"RoPE in both layouts, {rope_thetas(rope)}, as in the base; end of answer {eos}",
    ]


def rope_thetas(rope: dict[str, Any] | None) -> str:
    """RoPE parameters in a few words: theta, or one for each kind of layer."""
    if not rope or "rope_theta" in rope:
        return f"theta {rope['rope_theta']:g}" if rope else "none"
    return ", ".join(f"{kind} theta {inner['rope_theta']:g}" for kind, inner in rope.items())


# ---- Chat in the terminal ------------------------------------------------------------------------


def chat(folder: Path, base: str | None) -> None:
    """Talk to an adapter folder or a merged folder, with the sampling, stops and SYSTEM text of its Modelfile.

    In a terminal the questions are one conversation; those of a file are asked one by one.
    """
    import_libraries()
    model, tokenizer, settings = load_chat(folder, base)
    stops = re.findall(r'^PARAMETER stop "(.*)"$', settings, re.MULTILINE)
    system = re.search(r'^SYSTEM """(.*?)"""$', settings, re.MULTILINE | re.DOTALL)
    opening = [{"role": "system", "content": system[1]}] if system else []
    messages = [*opening]
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{folder}: type a message; Ctrl-C ends an answer, an empty line or Ctrl-D the chat")
        print(f"system     {system[1] if system else 'none: the training data has none, or more than one'}")
        print(f"answers    differ each time (temperature {SAMPLING['temperature']}); those of training do not")
    for question in typed_questions() if terminal else filter(None, map(str.strip, sys.stdin)):
        if not terminal:
            print(f"\n> {question}")
            messages = [*opening]
        # A terminal or a file in another encoding leaves bytes that are no text.
        messages.append({"role": "user", "content": question.encode(errors="replace").decode()})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        streamer = answer_streamer(tokenizer, stops)
        try:
            model.generate(**inputs, **SAMPLING, do_sample=True, max_new_tokens=CHAT_TOKENS, streamer=streamer,
                           stop_strings=stops, tokenizer=tokenizer)  # fmt: skip
        except KeyboardInterrupt:
            if not terminal:
                raise
            streamer.end()  # the next question may refer to what was read
        messages.append({"role": "assistant", "content": streamer.answer.strip()})


def load_chat(folder: Path, base: str | None) -> tuple[PreTrainedModel, Any, str]:
    """The model of an adapter or a merged folder, on the GPU if there is one, its tokenizer and its Modelfile."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if (folder / "adapter_config.json").is_file() or not folder.is_dir():
        adapter = read_adapter(folder)
        weights = find_base(base, adapter)
        settings, _ = modelfile_of(adapter, AutoConfig.from_pretrained(weights))
        model = AutoModelForCausalLM.from_pretrained(weights, dtype="auto")
        model = PeftModel.from_pretrained(model, folder)
    else:
        settings = read_text(folder / "Modelfile")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, AutoTokenizer.from_pretrained(folder), settings


def answer_streamer(tokenizer: Any, stops: list[str]) -> Any:
    """A TextStreamer that prints an answer word by word and keeps it, without the stop text.

    A stop has no space in it, so it comes in one piece.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        answer = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.answer += before_stop(text, stops)
            super().on_finalized_text(before_stop(text, stops), stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def before_stop(text: str, stops: list[str]) -> str:
    """The text up to the first stop in it."""
    return re.split("|".join(map(re.escape, stops)), text, maxsplit=1)[0]


def typed_questions() -> Iterator[str]:
    """What is typed in the terminal, up to an empty line, Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lets input() edit a line and remember the last ones
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while question := input("> ").strip():
            yield question


# ---- The output folder: replaced as a whole, or unchanged ----------------------------------------


def check_output(output: Path, adapter: Path, base: Path, overwrite: bool) -> None:
    """Refuse an output folder that this script did not write, or that holds files it still has to read."""
    for other in (adapter.resolve(), base.resolve()):
        if output == other or output in other.parents:
            raise InputError(f"{output}: holds {other}, which is still needed; choose another --output")
    existing = next(folder for folder in output.parents if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise InputError(f"{output}: cannot write into {existing}; make it writable or choose another --output")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not overwrite:
        raise InputError(f"{output}: already exists; choose another --output, or replace it with --overwrite")
    if output.exists() and not ((output / "Modelfile").is_file() and (output / "config.json").is_file()):
        raise InputError(f"{output}: not created by merge_lora.py; refusing to overwrite it; move it away yourself")


def check_disk(plan: Plan, folder: Path) -> None:
    """Refuse to start if the merged folder, which is as large as the base, will not fit."""
    need = sum(shard.stat().st_size for shard in shards(plan.tensors)) + (64 << 20)  # tokenizer and the like
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"{folder}: {gigabytes(free)} free, {gigabytes(need)} needed; make room or choose another --output"
        )


def swap_folders(output: Path) -> tuple[Path, Path]:
    """Hidden folders beside `output`: the one being written, and the one that it has just replaced."""
    return output.with_name(f".{output.name}.merging"), output.with_name(f".{output.name}.replaced")


def recover_replaced(output: Path) -> None:
    """Put the earlier merge back if the last run was killed between its two renames."""
    _, old = swap_folders(output)
    if old.exists() and not output.exists():
        old.rename(output)


@contextlib.contextmanager
def written_beside(output: Path) -> Iterator[Path]:
    """A folder next to `output` that replaces it if all goes well, and is deleted otherwise."""
    partial, old = swap_folders(output)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # too late to stop
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, signal.SIG_IGN)
        if output.exists():
            output.rename(old)
        partial.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- Small helpers -------------------------------------------------------------------------------


@contextlib.contextmanager
def explain(place: str | Path, hint: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn a library's error into one line: the place, then the hint, in which {error} is the error's first line."""
    try:
        yield
    except errors as error:
        message = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"{place}: {hint.replace('{error}', message)}") from None


def read_text(file: Path) -> str:
    """The text of a UTF-8 file; InputError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{file}: {problem}; name a readable file") from None


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file; InputError with the line if it is not valid."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not JSON ({error.msg}); copy or write it again") from None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a dict as readable UTF-8 JSON."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def gigabytes(size: float) -> str:
    """Bytes as text, in GB of 10^9."""
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(run())
