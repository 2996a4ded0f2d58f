#!/usr/bin/env python3
"""Merge a trained LoRA adapter into its base model: a GGUF for Ollama, llama.cpp and LM Studio, safetensors for the rest.

    python3 merge_lora.py                       # runs_dolores_v5/llama31_clean → dolores_v5_full
    python3 merge_lora.py --adapter A --base B --output C --overwrite
    ollama create dolores-v5 -f dolores_v5_full/Modelfile
    python3 merge_lora.py --check-ollama dolores-v5   # does Ollama send the model what training did?
    python3 merge_lora.py --chat                # talk to the adapter or the merged model in the terminal

The base is streamed: each shard is copied byte for byte, and only the tensors that have an adapter are
replaced on the way, a few rows at a time. Peak memory is little more than what the libraries take, whatever
the size of the model, and no GPU is needed. The result is PEFT's, bit for bit. The GGUF is what llama.cpp's
own tools make of it: its converter names and arranges the tensors, and ggml's encoder writes them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

import train_sft_dolores as trainer
from train_sft_dolores import InputError, StoredTensor, escape_controls, explain, read_header, write_json

if TYPE_CHECKING:  # these imports take seconds, and neither --help nor a wrong flag should wait for them
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

CHECKPOINT_FILES = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
                    "chat_template.jinja")  # fmt: skip
RUN_FILES = ("training_args.json", "config.json")  # of a whole run; a checkpoint has them in its parent folder
CHAT_FORMAT = ("before", "after", "eos_token", "answer_start", "no_system", "folds_system")  # in training_args.json
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE")  # must travel with the weights
VOCABULARY_FILES = ("tokenizer.model",)  # SentencePiece, which llama.cpp prefers for Gemma, Phi-3, Mistral
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names and torch's
# --gguf: most weights are of the type that its name begins with.
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "BF16")
NUM_CTX = 8192  # Ollama's context window, unless the base has a smaller one
CHAT_TOKENS = 1024  # tokens at most in an answer of --chat
SAMPLING = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}  # the Modelfile's temperature, and Ollama's defaults

# What training sets in adapter_config.json. Anything else that is switched on (DoRA, biases, modules_to_save, ranks by
# pattern …) changes the result in a way that W + s B A would lose.
PLAIN_LORA = {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_alpha",
              "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
              "target_modules", "task_type"}  # fmt: skip
BLOCK = 1 << 18  # weights merged at once: what fits into a processor's cache is faster

# What Ollama reads: in Go what chat_template.jinja says in Jinja; @…@ are filled in. With `.Prompt` alone, Ollama
# would omit the end token from earlier answers, hence `.Messages`. If the assistant has the last message, it is the
# beginning of the answer to generate and stays open.
TEMPLATE = """@before@{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}@no_system@
{{- if eq .Role "system" }}@before_system@{{ .Content }}@after_system@{{ else if eq .Role "assistant" }}@before_answer@{{ .Content }}{{ if not $last }}@after_assistant@{{ end }}{{ else }}@before_user@{{ .Content }}@after_user@{{ end }}
{{- if and $last (ne .Role "assistant") }}@prompt@{{ end }}@after@
{{- end }}"""

CARD = """---
@base_model@library_name: transformers
pipeline_tag: text-generation
---
# @name@

A LoRA adapter merged into `@base@`@revision@ (@dtype@), by `merge_lora.py`.
@run@
## License

@license@
"""
CARD_GGUF = """
## Run it

Ollama 0.30 or newer, from the folder above this one:

```bash
ollama create @quoted_name@ -f @folder@/Modelfile
ollama run @quoted_name@
```

LM Studio and llama.cpp open the file `@gguf@`, for instance `llama-cli -m @folder@/@gguf@`.
From the Hub, where this folder is uploaded: `ollama run hf.co/you/@quoted_name@:@kind@`.
"""
CARD_SAFETENSORS = """
transformers (`pipeline("text-generation", "./@folder@")`), vLLM and the next training read the folder itself.
"""
LICENSE_NOTE = "The license of the base model applies to these weights too."
BUILT_WITH_LLAMA = """**Built with Llama.** The Llama Community License applies to these weights too: keep its notice and its use
policy with them, and begin the name of a published model with "Llama"."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP arrived; the argument is the signal's number. SIGINT is a KeyboardInterrupt."""


# ---- The flags -----------------------------------------------------------------------------------

EXAMPLES = """examples:
  python3 merge_lora.py                                     # merge the documented run
  python3 merge_lora.py --adapter my_run --output my_model  # merge another run
  python3 merge_lora.py --gguf Q4_K_M --gguf-only           # a smaller file, and no safetensors
  python3 merge_lora.py --chat my_run                       # talk to an adapter or a merged folder
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; every default is that of the documented run."""
    parser = trainer.OneLineParser(
        prog="merge_lora.py",
        usage="%(prog)s [options]",
        description="Merge a LoRA adapter into its base model, for Ollama, llama.cpp, LM Studio and transformers.",
        epilog=EXAMPLES,
        formatter_class=trainer.HelpFormatter,
        allow_abbrev=False,
    )
    parser.positional = "--adapter"
    parser.add_argument("--adapter", type=Path, default=trainer.DEFAULT_OUTPUT, metavar="DIR",
                        help="output folder of train_sft_dolores.py, or a checkpoint in it")  # fmt: skip
    parser.add_argument("--base", metavar="NAME",
                        help="base model, a folder or a Hugging Face id (default: the one recorded in the adapter)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("dolores_v5_full"), metavar="DIR",
                        help="folder for the merged model")  # fmt: skip
    parser.add_argument("--name", metavar="NAME", type=trainer.model_name,
                        help="the model's name in Ollama and in its README.md (default: that of the training, or "
                             "dolores-v5)")  # fmt: skip
    parser.add_argument("--gguf", default="Q8_0", choices=(*GGUF_TYPES, "none"),
                        help="type of the file for Ollama, llama.cpp and LM Studio, NAME-Q8_0.gguf: the smaller, the "
                             "less exact; none writes safetensors only")  # fmt: skip
    parser.add_argument("--gguf-only", action="store_true",
                        help="leave the safetensors out, which transformers, vLLM and the next training read")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge in the output folder")
    parser.add_argument("--force", action="store_true", help="merge into a base with other weights than in training")
    parser.add_argument("--check-ollama", metavar="NAME",
                        help="do not merge; ask a running Ollama whether its model NAME gets the text and the tokens of "
                             "the training (the server of OLLAMA_HOST; the merged folder of --output)")  # fmt: skip
    parser.add_argument("--chat", nargs="?", const="", metavar="DIR",
                        help="do not merge; talk to this adapter or merged folder (default: --output if it holds "
                             "safetensors, else --adapter); questions can come from a file: --chat DIR < FILE")  # fmt: skip
    args = parser.parse_args(argv)
    if args.gguf_only and args.gguf == "none":
        parser.error("--gguf-only and --gguf none leave nothing to write")
    return args


# ---- The story -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Merge as the command line says; returns the exit status. InputError and Stopped say how else it can end."""
    args = parse_args(argv)
    start, output = time.monotonic(), args.output.resolve()
    if args.check_ollama:
        return check_ollama(args.check_ollama, args.output)
    if args.chat is not None:
        chat(Path(args.chat or (args.output if any(args.output.glob("*.safetensors")) else args.adapter)), args.base)
        return 0
    adapter = read_adapter(args.adapter)
    name = args.name or adapter.training.get("args", {}).get("name") or "dolores-v5"
    base = find_base(args.base, adapter)
    recover_replaced(output)
    check_output(output, adapter.folder, base, args.overwrite)
    plan = plan_merge(adapter, base)
    if not args.force and trainer.fingerprint(plan.tensors) != adapter.training["base"]["fingerprint"]:
        problem = "not the base that the adapter was trained on, its weights differ"
        raise InputError(f"{base}: {problem}; name the right --base, or merge anyway with --force")

    weights = sum(tensor.end - tensor.start for tensor in plan.tensors.values())
    print(f"merging    {adapter.folder} into {base} ({weights / 1e9:.2f} GB)", flush=True)
    with written_beside(output) as folder:
        write_small_files(adapter, base, plan, folder, with_weights=not args.gguf_only)
        gguf = arrange_gguf(adapter, plan, folder, name, args)
        write_run_files(adapter, plan, folder, f"./{gguf.file.name}" if gguf else ".")
        write_card(adapter, plan, folder, name, args, gguf)
        check_disk(output.parent, (0 if args.gguf_only else weights) + (gguf.size if gguf else 0))
        if not args.gguf_only:
            merge_shards(plan, folder)
        if gguf:
            gguf.write()
        checks = check_result(adapter, plan, folder, gguf)
        size = sum(file.stat().st_size for file in folder.iterdir())

    print(f"written    {args.output} ({size / 1e9:.2f} GB) in {time.monotonic() - start:.0f} s")
    for check in checks:
        print(f"checked    {check}")
    create = ["ollama", "create", name, "-f", f"{args.output}/Modelfile"]
    print("next      ", shlex.join(create if gguf else [sys.executable, sys.argv[0], "--chat", str(args.output)]))
    return 0


def run(argv: list[str] | None = None) -> int:
    """Run main and return the exit status: its own, 2 for a user error, 129, 130 or 143 for a signal."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Stopped(number)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt, also if a shell had it ignored
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, stop)
    try:
        return main(argv)
    except Exception as error:
        line = trainer.describe_error(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stopped:
        print("stopped; nothing was changed", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)


# ---- The adapter folder, and the base recorded in it ---------------------------------------------


class Adapter(NamedTuple):
    """The folder that training wrote: the contract between the two scripts."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json, as PEFT wrote it
    training: dict[str, Any]  # training_args.json: chat_format, base, data, args
    end_token_id: int  # of the chat format's end token
    largest_id: int
    adds_bos: bool
    added_tokens: dict[str, dict[str, Any]]  # by id, as in tokenizer_config.json


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter folder; InputError if it is incomplete or cannot be merged."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train one with train_sft_dolores.py, or name it with --adapter")
    checkpoint = folder.name.startswith("checkpoint-") and not (folder / "training_args.json").exists()
    run_folder = folder.parent if checkpoint else folder
    required = [folder / name for name in CHECKPOINT_FILES] + [run_folder / name for name in RUN_FILES]
    for file in required[:-1] if checkpoint else required:  # config.json is there when training has ended
        if not file.is_file():
            fix = "train_sft_dolores.py writes it when training has ended"
            if saved := sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime):
                fix += f": continue it with --resume, or merge what is there with --adapter {saved[-1]}"
            raise InputError(f"{file}: missing; {fix}")
    config, training = read_json(folder / "adapter_config.json"), read_json(run_folder / "training_args.json")
    for key, inner in (("chat_format", CHAT_FORMAT), ("base", ("model", "fingerprint"))):
        if not isinstance(training.get(key), dict) or any(k not in training[key] for k in inner):
            raise InputError(f"{run_folder}/training_args.json: no {key} in it; train_sft_dolores.py writes it")
    check_mergeable(folder / "adapter_config.json", config)
    return Adapter(folder, config, training, *read_tokenizer(folder, training["chat_format"]["eos_token"]))


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file; InputError if there is none, or none that is valid."""
    with explain(str(file), "not JSON ({error}); copy or write it again", OSError, ValueError):
        return trainer.read_json(file)


def read_tokenizer(folder: Path, end_token: str) -> tuple[int, int, bool, dict[str, dict[str, Any]]]:
    """What an Adapter says about its tokenizer, which is not kept: it takes tens of MiB."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    with explain(str(file), "{error}; copy it from the base", Exception):  # tokenizers raises plain Exception
        tokenizer = Tokenizer.from_file(str(file))
    end_token_id = tokenizer.token_to_id(end_token)
    if end_token_id is None:
        raise InputError(f"{file}: has no {end_token}, the chat format's end token; is it the right adapter?")
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = tokenizer.get_added_tokens_decoder()
    described = {str(i): {key: getattr(token, key) for key in keys} for i, token in added.items()}
    return end_token_id, max(tokenizer.get_vocab().values()), bool(tokenizer.encode("").ids), described


def check_mergeable(place: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter_config.json with a setting that merging tensor by tensor would lose."""
    # PiSSA, OLoRA, LoftQ and the like change the base when training starts: the published base no longer fits.
    unusual = [key for key in sorted(config.keys() - PLAIN_LORA) if config[key] and config[key] != "none"]
    unusual += ["init_lora_weights"] if config.get("init_lora_weights", True) not in (True, False, "gaussian") else []
    unusual += ["peft_type"] if config.get("peft_type") != "LORA" else []
    if unusual:
        problem = f"{unusual[0]} is {config.get(unusual[0])!r}, which this merge would lose"
        raise InputError(f"{place}: {problem}; use PEFT's own merge_and_unload")


def find_base(named: str | None, adapter: Adapter) -> Path:
    """The base's folder: a local one, or a Hub id through the Hugging Face cache at the revision of the training."""
    recorded = adapter.training["base"]
    model = named or recorded["model"]
    if Path(model).is_dir():
        return Path(model)
    revision = recorded.get("revision") if model == recorded["model"] else None  # another model has other commits
    patterns = ["*.json", "*.safetensors", *VOCABULARY_FILES, *LICENSE_FILES]
    return Path(trainer.download_model(f"--base {model}", model, patterns, revision))


# ---- The plan: which tensor gets which adapter, and every check that needs no weights ------------


class Plan(NamedTuple):
    """What merging needs to know before it reads a weight."""

    config: PreTrainedConfig  # of the base
    tensors: dict[str, StoredTensor]  # of the base
    layers: dict[str, tuple[StoredTensor, StoredTensor, float]]  # A, B, scale of B A; by name of the base's weight


def plan_merge(adapter: Adapter, base: Path) -> Plan:
    """Match adapter and base by their headers; InputError if they do not fit each other."""
    tensors = read_base_headers(base)
    trainer.load_libraries()
    from transformers import AutoConfig

    hint = "{error}; name a causal language model with --base"
    with explain(str(base / "config.json"), hint, ValueError, OSError, KeyError):
        config = AutoConfig.from_pretrained(base)
    if adapter.largest_id >= config.vocab_size:
        problem = f"has token id {adapter.largest_id}, but the base's embedding {config.vocab_size} rows"
        raise InputError(f"{adapter.folder}/tokenizer.json: {problem}; name the right --base")
    return Plan(config, tensors, match_layers(adapter, tensors))


def read_base_headers(base: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards of the base, by name; no weight is read."""
    tensors = trainer.read_headers(str(base), base)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{tensor.file}: {name} is {tensor.dtype}; the base must have bf16, f16 or f32 weights")
    return tensors


def match_layers(adapter: Adapter, tensors: dict[str, StoredTensor]) -> dict[str, tuple]:
    """Plan.layers: the adapter of each weight; every tensor must be used, and every target adapted."""
    file, config, layers = adapter.folder / "adapter_model.safetensors", adapter.config, {}
    stored, prefix = read_header(str(adapter.folder), file), "base_model.model."
    for module in {key.removeprefix(prefix).partition(".lora_")[0] for key in stored}:
        a, b = (stored.get(f"{prefix}{module}.lora_{kind}.weight") for kind in "AB")
        base = tensors.get(f"{module}.weight")
        if not (a and b and base) or [b.shape[0], a.shape[1]] != base.shape or a.shape[0] != b.shape[1]:
            raise InputError(f"{file}: {module} fits no layer of the base, or is not complete; name the right --base")
        layers[f"{module}.weight"] = (a, b, config["lora_alpha"] / a.shape[0])
    for name in tensors.keys() - layers.keys():
        if name.split(".")[-2] in config["target_modules"] and name.endswith(".weight"):
            raise InputError(f"{file}: no adapter of {name} in it; is it complete, and does it belong to this base?")
    return layers


# ---- Merging -------------------------------------------------------------------------------------


def merge_shards(plan: Plan, folder: Path) -> None:
    """Write every shard of the base into `folder`, a few rows at a time, with the adapted tensors merged.

    A merged tensor has the shape and dtype of the base's, so the header and every offset stay as they are.
    """
    import torch

    for shard in sorted({tensor.file for tensor in plan.tensors.values()}):
        tensors = sorted((t.start, name) for name, t in plan.tensors.items() if t.file == shard)
        with open(folder / shard.name, "wb") as target:
            with open(shard, "rb") as source:
                target.write(source.read(tensors[0][0]))  # the header
            for _, name in tensors:
                for rows in merged_rows(plan, name):
                    target.write(rows.view(torch.uint8).numpy())


def merged_rows(plan: Plan, name: str) -> Iterator[Tensor]:
    """Yield a tensor in blocks of rows: W, or W + s B A in PEFT's steps. NaN or infinity is an InputError.

    A block has a multiple of 16 rows: a matrix product of an odd number may round differently than that of all.
    """
    import torch

    torch.set_num_threads(1)  # the blocks are small: threads that wait for each other take longer
    stored, layer = plan.tensors[name], plan.layers.get(name)
    dtype, width = getattr(torch, DTYPES[stored.dtype]), math.prod(stored.shape[1:])
    a, b, scale = (read_tensor(layer[0]).float(), read_tensor(layer[1]).float(), layer[2]) if layer else (None, None, 1)
    height = max(16, BLOCK // width // 16 * 16)
    with open(stored.file, "rb") as source, torch.no_grad():
        source.seek(stored.start)
        for first in range(0, stored.shape[0], height):
            count = min(height, stored.shape[0] - first) * width
            rows = torch.frombuffer(bytearray(source.read(count * dtype.itemsize)), dtype=dtype).view(-1, width)
            if a is not None and b is not None:
                rows = torch.mm(b[first : first + height], a).mul_(scale).add_(rows).to(dtype)
            # A NaN or infinity makes the sum one, in one fast pass; the sum of finite numbers may overflow: look again.
            if not (rows.sum().isfinite() or rows.isfinite().all()):
                problem = f"NaN or infinity in {name}, from the base or the adapter"
                raise InputError(f"{stored.file}: {problem}; download the base or train the adapter again")
            yield rows


def read_tensor(stored: StoredTensor) -> Tensor:
    """One tensor from its file."""
    import torch

    with open(stored.file, "rb") as stream:
        stream.seek(stored.start)
        data = bytearray(stream.read(stored.end - stored.start))
    return torch.frombuffer(data, dtype=getattr(torch, DTYPES[stored.dtype])).view(stored.shape)


# ---- The GGUF: llama.cpp's converter arranges it, ggml's encoder writes it -----------------------


def arrange_gguf(adapter: Adapter, plan: Plan, folder: Path, name: str, args: argparse.Namespace) -> Gguf | None:
    """The GGUF to write, if any; a warning if llama.cpp's converter does not know the base."""
    if args.gguf == "none":
        return None
    # By this name llama.cpp knows that the control tokens swallow the white space after them.
    strips = plan.config.model_type == "phi3" and any(token["rstrip"] for token in adapter.added_tokens.values())
    try:
        return Gguf(plan, folder, f"Phi-3 {name}" if strips else name, name.rpartition("/")[2], args.gguf)
    except (NotImplementedError, ValueError, KeyError) as error:
        problem = f"no GGUF: llama.cpp's converter does not know this base ({trainer.first_line(error)})"
    if args.gguf_only:
        raise InputError(f"--gguf-only: {problem}; leave it out")
    print(f"warning    {problem}; make one with a newer llama.cpp and name it after FROM in the Modelfile")
    return None


class Gguf:
    """A GGUF before its weights are written: llama.cpp's converter has arranged all the rest.

    The converter works on lazy tensors: shapes are known, values are computed when the file is written.
    """

    def __init__(self, plan: Plan, folder: Path, title: str, name: str, kind: str):
        """Arrange NAME-KIND.gguf in `folder`. NotImplementedError and the like for a base that the converter does not know."""
        for log in ("hf-to-gguf", "gguf", "metadata"):
            logging.getLogger(log).setLevel(logging.ERROR)
        import gguf
        import torch
        from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
        from conversion.base import LazyTorchTensor

        def whole(name: str) -> Tensor:  # for those that are small or that the converter rearranges: queries and keys
            return torch.cat([rows.float() for rows in merged_rows(plan, name)]).view(plan.tensors[name].shape)

        def lazy(name: str) -> Any:
            return LazyTorchTensor(meta=torch.empty(plan.tensors[name].shape, device="meta"), args=(name,), func=whole)

        def quantize(data: Any, to: Any) -> Any:
            later = to != types.F32 and isinstance(data, gguf.LazyNumpyTensor)
            return Encoded(plan, data, to) if later else own_quantize(data, to)

        known = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
        self.file, types = folder / f"{name}-{kind}.gguf", gguf.GGMLQuantizationType

        class Converter(known):  # type: ignore[valid-type, misc]
            model_arch = known.model_arch

            def index_tensors(self, **_: object) -> dict[str, Any]:
                found = (self.filter_tensors((name, functools.partial(lazy, name))) for name in plan.tensors)
                return dict(filter(None, found))

            def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
                forced = super().tensor_force_quant(name, new_name, bid, n_dims)
                if n_dims < 2 or not isinstance(forced, bool):
                    return forced
                width, tied = self.model_tensors[name]().shape[-1], "lm_head.weight" not in self.model_tensors
                return types[weight_type(kind, new_name, bid or 0, self.block_count, width, tied)]

        # The converter has no hook for its encoder, which knows no K-quants and takes ten times as long as ggml's.
        own_quantize, gguf.quants.quantize = gguf.quants.quantize, quantize
        try:
            converter = Converter(folder, gguf.LlamaFileType[f"MOSTLY_{kind}"], self.file, model_name=title)
            converter.dir_model_card = folder / name  # none: this folder's own name would get into the file
            converter.prepare_tensors()
            converter.prepare_metadata(vocab_only=False)
        finally:
            gguf.quants.quantize = own_quantize
        self.writer = converter.gguf_writer
        self.keys = {key: entry.value for key, entry in self.writer.kv_data[0].items()}
        self.types = {name: tensor.dtype.name for name, tensor in self.writer.tensors[0].items()}
        self.size = sum(tensor.nbytes for tensor in self.writer.tensors[0].values())

    def write(self) -> None:
        """Write the file: minutes for the K-quants, so with a progress bar."""
        self.writer.write_header_to_file(path=self.file)
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file(progress=sys.stderr.isatty())
        self.writer.close()


def weight_type(kind: str, name: str, layer: int, layers: int, width: int, tied: bool) -> str:
    """The type that llama-quantize gives to a weight of a dense model, by its name in the GGUF."""
    if kind == "BF16":
        return kind
    chosen = kind.removesuffix("_M")
    if chosen != kind:  # in a mix, what costs most: the head, and values and ffn_down in a half of the layers
        value = "attn_v." in name or "attn_qkv." in name
        chosen = "Q5_K" if value and layers == 80 else chosen  # a 70B
        more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        head = name == ("token_embd.weight" if tied else "output.weight")
        chosen = "Q6_K" if head or (more_bits and (value or "ffn_down." in name)) else chosen
    if width % 256:  # the blocks of the K-quants have 256 weights, all others 32
        chosen = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(chosen, chosen)
    return "F16" if width % 32 else chosen


class Encoded:
    """A tensor as the converter's writer takes one, encoded while it is written: a few rows at a time, on all cores."""

    dtype = trainer.np.dtype("uint8") if trainer.np else None

    def __init__(self, plan: Plan, data: Any, kind: Any):
        from gguf import quant_shape_to_byte_shape

        self.plan, self.data, self.kind = plan, data, kind
        self.shape = quant_shape_to_byte_shape(data.shape, kind)
        self.nbytes = math.prod(self.shape)

    def tofile(self, stream: BinaryIO) -> None:
        """Write the encoded rows in order."""
        cores, rows, row_bytes, quantize = os.cpu_count() or 1, self.rows(), self.shape[-1], ggml_encoder()

        def encode(block: Tensor) -> Any:
            block, encoded = block.float().contiguous(), trainer.np.empty((len(block), row_bytes), "uint8")
            quantize(self.kind, block.data_ptr(), encoded.ctypes.data, 0, *block.shape, None)
            return encoded.data

        with ThreadPoolExecutor(cores) as pool:
            waiting = [pool.submit(encode, block) for block in islice(rows, 4 * cores)]
            while waiting:
                stream.write(waiting.pop(0).result())
                waiting += [pool.submit(encode, block) for block in islice(rows, 1)]

    def rows(self) -> Iterator[Tensor]:
        """The values in blocks of rows: from the base, or of the whole tensor where the converter has rearranged it."""
        import torch
        from gguf import LazyNumpyTensor

        made_from = self.data._args[0]._args[0]  # `lazy` gives a tensor of the base its name; others have a tensor here
        if isinstance(made_from, str):
            yield from merged_rows(self.plan, made_from)
        else:
            whole = torch.from_numpy(LazyNumpyTensor.to_eager(self.data))
            yield from whole.split(max(1, BLOCK // whole.shape[-1]))


def ggml_encoder() -> Callable[..., int]:
    """ggml's own encoder, from rows of float32 to the bytes of a type. It lets go of Python's lock."""
    import ctypes

    import libggml

    library = sorted(Path(libggml.__path__[0]).glob("lib*/libggml-base.*"))[0]
    quantize, pointer, integer = ctypes.CDLL(str(library)).ggml_quantize_chunk, ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes, quantize.restype = (ctypes.c_int, pointer, pointer, *[integer] * 3, pointer), ctypes.c_size_t
    return quantize


# ---- The small files -----------------------------------------------------------------------------


def write_small_files(adapter: Adapter, base: Path, plan: Plan, folder: Path, with_weights: bool) -> None:
    """Configs and tokenizer for every reader, and licenses."""
    index = ["model.safetensors.index.json"] if with_weights else []
    for name in (*index, *VOCABULARY_FILES, *LICENSE_FILES):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(adapter.folder / name, folder / name)
    config = read_json(base / "config.json")
    config.pop("auto_map", None)  # points to the base's own Python files, which are not copied
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(base, adapter.end_token_id))
    write_json(folder / "tokenizer_config.json", tokenizer_config(adapter, plan.config.model_type, folder))


def generation_config(base: Path, end_token: int) -> dict[str, Any]:
    """The base's generation_config.json, with the trained end token among those that end an answer."""
    file = base / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    eos = config.get("eos_token_id", read_json(base / "config.json").get("eos_token_id"))
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    eos = eos if end_token in eos else [*eos, end_token]
    return {**config, "eos_token_id": eos if len(eos) > 1 else eos[0]}


def tokenizer_config(adapter: Adapter, model_type: str, folder: Path) -> dict[str, Any]:
    """Without what only transformers 5 understands, and with what llama.cpp's converter looks for."""
    config = read_json(adapter.folder / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only", "chat_template", "auto_map"):
        config.pop(key, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a dict
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # The converter finds tokens that tokenizer.model lacks only here.
    config["added_tokens_decoder"] = adapter.added_tokens
    config["eos_token"] = adapter.training["chat_format"]["eos_token"]
    config["add_bos_token"] = adapter.adds_bos  # else llama.cpp adds one to Phi-3's prompts
    # By this class the converter tells Phi-4 from Phi-3.
    phi4 = model_type == "phi3" and not (folder / "tokenizer.model").is_file()
    return {**config, "tokenizer_class": "GPT2Tokenizer" if phi4 else "PreTrainedTokenizerFast"}


def write_run_files(adapter: Adapter, plan: Plan, folder: Path, source: str) -> None:
    """Modelfile, and what it says in the files that the Hub hands to Ollama."""
    chat_format = adapter.training["chat_format"]
    num_ctx = min(NUM_CTX, plan.config.max_position_embeddings)
    settings = {"temperature": SAMPLING["temperature"], "num_ctx": num_ctx, "stop": stop_texts(chat_format)}
    system = ollama_system((adapter.training.get("data") or {}).get("system"))
    (folder / "Modelfile").write_text(modelfile(chat_format, settings, source, system), encoding="utf-8")
    (folder / "template").write_text(go_template(chat_format), encoding="utf-8")
    write_json(folder / "params", settings)
    if system:
        (folder / "system").write_text(system, encoding="utf-8")


def go_template(chat_format: dict[str, Any]) -> str:
    """Ollama's TEMPLATE for a chat format."""
    before, after, no_system = chat_format["before"], chat_format["after"], chat_format["no_system"]
    folds = chat_format["folds_system"]  # then a user turn right after the system turn has nothing before it
    values = {
        "before": '{{- $before := "" }}' if folds else "",
        "after": "{{- $before = .Role }}" if folds else "",
        "no_system": f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{no_system}{{{{ end }}}}' if no_system else "",
        **{f"before_{role}": text for role, text in before.items()},
        **{f"after_{role}": text for role, text in after.items()},
        "before_answer": before["assistant"] + chat_format["answer_start"],
        "prompt": before["assistant"],
    }
    if folds:
        values["before_user"] = f'{{{{ if ne $before "system" }}}}{before["user"]}{{{{ end }}}}'
    return fill(TEMPLATE, values)


def modelfile(chat_format: dict[str, Any], settings: dict[str, Any], source: str, system: str | None = None) -> str:
    """The Modelfile of the model in `source`, a path from the Modelfile's folder."""
    stops = "\n".join(f'PARAMETER stop "{stop}"' for stop in settings["stop"])
    numbers = "\n".join(f"PARAMETER {key} {settings[key]}" for key in ("temperature", "num_ctx"))
    system = f'\nSYSTEM """{system}"""\n' if system else ""
    return f'FROM {source}\n\nTEMPLATE """{go_template(chat_format)}"""\n\n{numbers}\n{stops}\n{system}'


def fill(template: str, values: dict[str, str]) -> str:
    """Replace each @key@ of a template."""
    return re.sub("@([a-z_]+)@", lambda found: values[found[1]], template)


def ollama_system(system: str | None) -> str | None:
    """The system turn that all conversations share → the text for SYSTEM, and a line about it on the screen.

    In a SYSTEM text Ollama drops every character that Go does not call printable, such as the joiners in an emoji of a
    family, and has no way to write three double quotes.
    """
    if not system:
        return None
    if '"""' in system:
        print('warning    the system turn contains """, which a Modelfile cannot hold; set it with /set system')
        return None
    lost = sorted({c for c in system if not (c.isprintable() or c in "\n\t")})
    names = ", ".join(f"U+{ord(c):04X} {unicodedata.name(c, '')}".strip() for c in lost)
    print(f"warning    Ollama drops {names} from a SYSTEM text; a program can send the turn itself" if lost else
          "system     the turn that all conversations share is in the Modelfile")  # fmt: skip
    return "".join((" " if c.isspace() else "") if c in lost else c for c in system)


def stop_texts(chat_format: dict[str, Any]) -> list[str]:
    """The end token, and the tags that open a turn: one in plain text ends nothing unless it is listed here."""
    opening = " ".join(chat_format["before"][role] for role in ("user", "system", "assistant"))
    return list(dict.fromkeys([chat_format["eos_token"], *re.findall(r"<[^<>\s]+>|\[[^][\s]+\]", opening)]))


def write_card(
    adapter: Adapter, plan: Plan, folder: Path, name: str, args: argparse.Namespace, gguf: Gguf | None
) -> None:
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
        "folder": shlex.quote(args.output.name),
        "gguf": gguf.file.name if gguf else "",
        "kind": args.gguf,
        "license": BUILT_WITH_LLAMA if is_metas_llama(model, folder) else LICENSE_NOTE,
    }
    values["run"] = fill((CARD_GGUF if gguf else "") + ("" if args.gguf_only else CARD_SAFETENSORS), values)
    (folder / "README.md").write_text(fill(CARD, values), encoding="utf-8")


def is_metas_llama(model: str, folder: Path) -> bool:
    """Whether the base is a Llama of Meta's, by its name or by the license that came with it."""
    licenses = [(folder / name).read_text("utf-8", "replace") for name in LICENSE_FILES if (folder / name).is_file()]
    named = re.search(r"(^|[_-])llama-?[234]", model.rstrip("/").rpartition("/")[2], re.IGNORECASE)
    return bool(named) or any(re.search(r"llama.{1,20}community license", text, re.IGNORECASE) for text in licenses)


# ---- Checks of the result ------------------------------------------------------------------------


def check_result(adapter: Adapter, plan: Plan, folder: Path, gguf: Gguf | None) -> list[str]:
    """Check the folder that was written. Returns one line per check; one that fails is a bug of ours."""
    checks = [f"{len(plan.tensors)} tensors of the base, no NaN or infinity",
              f"{2 * len(plan.layers)} adapter tensors used once each, in {len(plan.layers)} layers"]  # fmt: skip
    if gguf:
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        # A template that mentions tools is one that Ollama may prefer to ours.
        assert gguf.keys["tokenizer.chat_template"] == template and "tool" not in template
        assert gguf.keys["tokenizer.ggml.eos_token_id"] == adapter.end_token_id
        assert gguf.keys.get("tokenizer.ggml.add_bos_token", False) == adapter.adds_bos
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(gguf.types.values()).most_common())
        checks.append(f"{gguf.file.name}: {kinds}; end of answer {adapter.training['chat_format']['eos_token']}")
    return checks


# ---- Does a running Ollama send the model what training did? -------------------------------------

HISTORY = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Hello, Ada."}]
QUESTIONS = [
    "Who are you?",
    "Qui es-tu ?",
    "L'été, 12345 fois « déjà » !",
    "日本 🙂",
    "a  b\tc\n\n  d",
    "{{ .Role }} \\n",
]
CHECKED_CHATS = [[*before, {"role": "user", "content": question}] for before in ([], HISTORY) for question in QUESTIONS]


def check_ollama(model: str, folder: Path) -> int:
    """Ask a running Ollama for a dozen chats: rendered text and number of tokens must be training's. 0 if they are, or 1."""
    if not (folder / "chat_template.jinja").is_file():
        raise InputError(f"{folder}: no merged model here; name its folder with --output")
    from transformers import AutoTokenizer

    tokenizer, ended = AutoTokenizer.from_pretrained(folder), False
    bos = tokenizer.bos_token if tokenizer("").input_ids else ""  # the engine adds it
    system = (folder / "system").read_text(encoding="utf-8") if (folder / "system").is_file() else None
    for chat in CHECKED_CHATS:
        whole = [{"role": "system", "content": system}, *chat] if system else chat
        wanted = tokenizer.apply_chat_template(whole, add_generation_prompt=True, tokenize=False)
        rendered = ask_ollama(model, chat, _debug_render_only=True)["_debug_info"]["rendered_template"]
        tokens = len(tokenizer(wanted, add_special_tokens=False).input_ids)
        answer = ask_ollama(model, chat, options={"temperature": 0, "num_predict": 1 if ended else CHAT_TOKENS})
        ended = ended or answer["done_reason"] == "stop"
        found, expected = (rendered, answer.get("prompt_eval_count")), (wanted.removeprefix(bos), tokens)
        if found != expected:
            for place, (text, count) in (("training", expected), (f"Ollama's {model}", found)):
                print(f"differs    {place}: {count} tokens, {text!r}")
            return 1
    print(f"checked    {len(CHECKED_CHATS)} chats: the text and its number of tokens are those of the training")
    print("checked    an answer ends by itself" if ended else f"differs    no answer ends within {CHAT_TOKENS} tokens")
    return int(not ended)


def ask_ollama(model: str, chat: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    """Ollama's reply to a chat; InputError where there is no server, or no such model."""
    host = os.environ.get("OLLAMA_HOST") or "127.0.0.1"
    url = (host if "://" in host else f"http://{host}" + ("" if ":" in host else ":11434")) + "/api/chat"
    content = json.dumps({"model": model, "messages": chat, "stream": False, **more}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content), timeout=600) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise InputError(f"{url}: {json.load(error).get('error')}; create it with `ollama create`") from None
    except OSError as error:
        raise InputError(f"{url}: no Ollama answers ({error}); start it, or set OLLAMA_HOST") from None


# ---- Chat in the terminal ------------------------------------------------------------------------


def chat(folder: Path, base: str | None) -> None:
    """Talk to an adapter folder or a merged folder, with the sampling, stops and SYSTEM text of its Modelfile.

    In a terminal the questions are one conversation; those of a file are asked one by one.
    """
    trainer.load_libraries()
    model, tokenizer, stops, system = load_chat(folder, base)
    opening = [{"role": "system", "content": system}] if system else []
    messages = [*opening]
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # bytes of another encoding are no text
    terminal = sys.stdin.isatty()
    if terminal:
        shown = escape_controls(system, "\n\t") if system else "none: the training data has none, or more than one"
        print(f"{folder}: type a message; Ctrl-C ends an answer, an empty line or Ctrl-D the chat")
        print(f"system     {shown}")
        print(f"answers    differ each time (temperature {SAMPLING['temperature']}); those of training do not")
    for question in typed_questions() if terminal else filter(None, map(str.strip, sys.stdin)):
        if not terminal:
            print(f"\n> {question}")
            messages = [*opening]
        messages.append({"role": "user", "content": question})
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


def load_chat(folder: Path, base: str | None) -> tuple[PreTrainedModel, Any, list[str], str | None]:
    """The model of an adapter or a merged folder, on the GPU if there is one, its tokenizer, stops and system turn."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "adapter_config.json").is_file() or not folder.is_dir():
        adapter = read_adapter(folder)
        stops = stop_texts(adapter.training["chat_format"])
        system = (adapter.training.get("data") or {}).get("system")
        model = AutoModelForCausalLM.from_pretrained(find_base(base, adapter), dtype="auto")
        model = PeftModel.from_pretrained(model, folder)
    else:
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"{folder}: no safetensors in it; chat in Ollama, or name the adapter: --chat ADAPTER")
        stops = read_json(folder / "params")["stop"]
        system = (folder / "system").read_text(encoding="utf-8") if (folder / "system").is_file() else None
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, AutoTokenizer.from_pretrained(folder), stops, system


def answer_streamer(tokenizer: Any, stops: list[str]) -> Any:
    """A TextStreamer that prints an answer word by word and keeps it, without the stop text.

    A stop has no space in it, so it comes in one piece.
    """
    from transformers import TextStreamer

    ends = re.compile("|".join(map(re.escape, stops)))

    class Streamer(TextStreamer):
        answer = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = ends.split(text, maxsplit=1)[0]
            self.answer += text
            super().on_finalized_text(escape_controls(text, "\n\t"), stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def typed_questions() -> Iterator[str]:
    """What is typed in the terminal, up to an empty line, Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lets input() edit a line and remember the last ones
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while question := input("> ").strip():
            yield question


# ---- The output folder: replaced as a whole, or unchanged ----------------------------------------


def check_output(output: Path, adapter: Path, base: Path, overwrite: bool) -> None:
    """Refuse an output folder that this script did not write, that holds files it still has to read, or cannot replace."""
    for other in (adapter.resolve(), base.resolve()):
        if output == other or output in other.parents:
            raise InputError(f"{output}: holds {other}, which is still needed; choose another --output")
    existing = next(folder for folder in output.parents if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise InputError(f"{output}: cannot write into {existing}; make it writable or choose another --output")
    if not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        if not overwrite:
            raise InputError(f"{output}: already exists; choose another --output, or replace it with --overwrite")
        if not ((output / "Modelfile").is_file() and (output / "config.json").is_file()):
            raise InputError(f"{output}: not created by merge_lora.py; refusing to overwrite it; move it away yourself")
    _, old = swap_folders(output)
    try:
        output.rename(old).rename(output)
    except OSError as error:  # a mount point: a disk or a volume of a container
        problem = f"cannot be replaced ({error.strerror}); choose a folder in it, such as --output {output / 'merged'}"
        raise InputError(f"{output}: {problem}") from None


def check_disk(folder: Path, need: int) -> None:
    """Refuse to start if what will be written does not fit."""
    need += 64 << 20  # the vocabulary in the GGUF, the file system's own
    free = shutil.disk_usage(folder).free
    if free < need:
        problem = f"{free / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed"
        raise InputError(f"{folder}: {problem}; make room, choose another --output, or a smaller --gguf")


def swap_folders(output: Path) -> tuple[Path, Path]:
    """Hidden folders beside `output`: the one being written, and the one that it has just replaced."""
    return output.with_name(f".{output.name}.merging"), output.with_name(f".{output.name}.replaced")


def recover_replaced(output: Path) -> None:
    """Put the earlier merge back if the last run was killed between its two renames."""
    _, old = swap_folders(output)
    if old.exists() and not output.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def written_beside(output: Path) -> Iterator[Path]:
    """A folder next to `output` that replaces it if all goes well, and is deleted otherwise."""
    partial, old = swap_folders(output)
    shutil.rmtree(partial, ignore_errors=True)
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


if __name__ == "__main__":
    with trainer.any_terminal():
        status = run()
    sys.exit(status)
