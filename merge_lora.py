#!/usr/bin/env python3
"""Merge a trained LoRA adapter into its base model: one folder for transformers, llama.cpp and Ollama.

    python3 merge_lora.py                       # runs_dolores_v5/llama31_clean → dolores_v5_full
    python3 merge_lora.py --adapter A --base B --output C --overwrite --verify
    ollama create dolores-v5 -f dolores_v5_full/Modelfile

The base is streamed: each shard is copied byte for byte, and only the tensors that have an adapter are
replaced on the way, one at a time. Peak memory is a few copies of the largest of these tensors, whatever
the size of the model, and no GPU is needed. PEFT's own code does the arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

if TYPE_CHECKING:  # these imports take seconds, and neither --help nor a wrong flag should wait for them
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "training_args.json", "config.json",
                 "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE")  # must travel with the weights
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names and torch's
INFINITY = {"BF16": ("int16", 0x7F80), "F16": ("int16", 0x7C00), "F32": ("int32", 0x7F800000)}  # its bits
COPY_CHUNK = 16 << 20  # bytes; tensors without an adapter are copied in pieces of this size
MERGE_BLOCK = 1 << 18  # weights merged at once
NUM_CTX = 8192  # Ollama's context window, unless the base has a smaller one

# The settings in adapter_config.json that this script handles. Anything else that is switched on (modules_to_save,
# biases, trained tokens, replicated layers …) changes the result in a way that merging tensor by tensor would lose.
SUPPORTED = {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
             "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
             "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
             "target_modules", "task_type", "use_dora", "use_rslora"}  # fmt: skip

# What `ollama create` reads. The TEMPLATE says in Go what chat_template.jinja says in Jinja; @…@ are filled in.
# With `.Prompt` alone, Ollama would omit the end token from earlier answers, hence `.Messages`. If the assistant
# has the last message, it is the beginning of the answer to generate and stays open.
MODELFILE = '''FROM @source@

TEMPLATE """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
@header@{{ .Content }}{{ if eq .Role "assistant" }}{{ if not $last }}@answer_end@{{ end }}{{ else }}@turn_end@{{ if $last }}@assistant@{{ end }}{{ end }}
{{- end }}"""

PARAMETER temperature 0.7
PARAMETER num_ctx @num_ctx@
@stops@
'''

# Held-out text for --verify, written for this file; it is in no training corpus.
VERIFY_TEXT = """Le train de nuit entra en gare avec vingt minutes de retard. Sur le quai, une femme tenait un parapluie
rouge et regardait sa montre sans impatience ; elle avait appris depuis longtemps que les horaires sont des promesses.

Pour faire une bonne soupe à l'oignon, il faut surtout du temps. On coupe les oignons finement, on les laisse fondre
dans le beurre pendant quarante minutes, puis on ajoute le bouillon, une feuille de laurier et un peu de vin blanc.

– Pourquoi le ciel est-il bleu ? demanda l'enfant.
– Parce que l'air disperse mieux la lumière bleue que la rouge, répondit sa grand-mère. Le soir, la lumière traverse
plus d'air, le bleu s'est perdu en route, et il ne reste que l'orange et le rouge."""


class InputError(Exception):
    """An error the user can fix: `place: problem; how to fix it` on one line, exit status 2."""


class VerificationFailed(Exception):
    """The merged folder does not answer like base + adapter: exit status 1, the output folder stays as it was."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; the argument is the signal's number."""


# ---- The flags -----------------------------------------------------------------------------------

EXAMPLES = """examples:
  python3 merge_lora.py                                     # merge the documented run
  python3 merge_lora.py --adapter my_run --output my_model  # merge another run
  python3 merge_lora.py --verify --overwrite                # merge again, and compare with base + adapter
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
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')} (see --help)\n")


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
                        help="output folder of train_sft_dolores.py (default: %(default)s)")  # fmt: skip
    parser.add_argument("--base", metavar="NAME",
                        help="base model, a folder or a Hugging Face id (default: the one recorded in the adapter)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("dolores_v5_full"), metavar="DIR",
                        help="folder for the merged model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge in the output folder")
    parser.add_argument("--base-weights", choices=("original", "nf4"), default="original", metavar="NAME",
                        help="original: merge into the base as published; nf4: into the weights that training on "
                             "NF4 used, quantized and restored (default: %(default)s)")  # fmt: skip
    parser.add_argument("--verify", nargs="?", const="", metavar="FILE",
                        help="compare the result with base + adapter on a text, by default one of our own; "
                             "needs memory for the whole model")  # fmt: skip
    return parser.parse_args(argv)


# ---- The story -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Merge as the command line says; InputError, VerificationFailed and Stopped say how else it can end."""
    args = parse_args(argv)
    start, output = time.monotonic(), args.output.resolve()
    adapter = read_adapter(args.adapter)
    base = find_base(args.base, adapter)
    check_output(output, adapter.folder, base, args.overwrite)
    text = read_text(Path(args.verify)) if args.verify else VERIFY_TEXT

    prepare_libraries()
    plan = plan_merge(adapter, base, args.base_weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_disk(plan, output.parent)
    size = gigabytes(sum(tensor.end - tensor.start for tensor in plan.tensors.values()))
    print(f"merging    {adapter.folder} into {base} ({size}, {args.base_weights} weights)", flush=True)

    with written_beside(output) as folder:
        merged = merge_shards(plan, folder)
        write_small_files(adapter, base, plan, folder)
        checks = check_result(adapter, base, plan, merged, folder)
        if args.verify is not None:
            checks.append(verify(adapter, base, plan, folder, text))

    print(f"written    {args.output} ({size}) in {time.monotonic() - start:.0f} s")
    for check in checks:
        print(f"checked    {check}")
    print(f"next       ollama create dolores-v5 -f {args.output}/Modelfile")


def run(argv: list[str] | None = None) -> int:
    """Run main and return its exit status: 0 done, 1 verification failed, 2 user error, 130 or 143 signal."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Stopped(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        main(argv)
    except InputError as problem:
        print(problem, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"{error.filename or 'output'}: {error.strerror}; the output folder is unchanged", file=sys.stderr)
        return 2
    except VerificationFailed as failed:
        print(failed, file=sys.stderr)
        return 1
    except Stopped as stopped:
        print("stopped; the partial output was deleted, an earlier merge is unchanged", file=sys.stderr)
        return 128 + stopped.args[0]
    return 0


def prepare_libraries() -> None:
    """Settings that must precede the import of torch, and silence for what PEFT imports."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: fewer page faults in fresh buffers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns that it has no CPU kernels
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT 0.21


# ---- The adapter folder, and the base recorded in it ---------------------------------------------


class Adapter(NamedTuple):
    """The folder that training wrote: the contract between the two scripts."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json, as PEFT wrote it
    training: dict[str, Any]  # training_args.json: chat_format, base, quantization
    tokenizer: Tokenizer


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter folder; InputError if it is incomplete or cannot be merged."""
    from tokenizers import Tokenizer

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train one with train_sft_dolores.py, or name it with --adapter")
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing; train_sft_dolores.py writes it when training has ended")
    config, training = read_json(folder / "adapter_config.json"), read_json(folder / "training_args.json")
    for key, inner in (("chat_format", ("header", "turn_end", "answer_end", "eos_token")), ("base", ("model",))):
        if not isinstance(training.get(key), dict) or any(k not in training[key] for k in inner):
            raise InputError(f"{folder}/training_args.json: no {key} in it; train_sft_dolores.py writes it")
    check_mergeable(folder / "adapter_config.json", config)
    with one_line_errors(folder / "tokenizer.json", {Exception: "{error}; copy it from the base"}):  # Rust's type
        return Adapter(folder, config, training, Tokenizer.from_file(str(folder / "tokenizer.json")))


def check_mergeable(place: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter_config.json with a setting that merging tensor by tensor would lose."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"{place}: {config.get('peft_type')} adapter; only LoRA, rsLoRA and DoRA can be merged here")
    # PiSSA, OLoRA, LoftQ and the like change the base when training starts: the published base no longer fits.
    if (init := config.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        raise InputError(f"{place}: init_lora_weights {init!r} has changed the base; use PEFT's own merge_and_unload")
    for key in sorted(config.keys() - SUPPORTED - {"init_lora_weights"}):
        if config[key] and config[key] != "none":
            raise InputError(f"{place}: {key} is set, which this merge would lose; use PEFT's own merge_and_unload")


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
    unreachable = "not in the cache, and cannot reach the Hugging Face Hub; name a local folder with --base"
    problems = {
        errors.GatedRepoError: f"gated; accept its licence on huggingface.co/{model}, then `hf auth login`",
        errors.RevisionNotFoundError: f"no revision {revision} on the Hugging Face Hub; name a local folder with --base",
        errors.RepositoryNotFoundError: "not found on the Hugging Face Hub; check the name, run `hf auth login`, "
        "or name a local folder with --base",
        errors.HFValidationError: "neither a folder nor a Hugging Face id; name the base with --base",
        errors.LocalEntryNotFoundError: unreachable,
        errors.HfHubHTTPError: unreachable,
        ConnectionError: unreachable,
    }
    with one_line_errors(model, problems):
        patterns = ["*.json", "*.safetensors", *LICENCE_FILES]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))


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


def read_bytes(stream: BinaryIO, start: int, buffer: Tensor) -> Tensor:
    """Fill a uint8 tensor from a file. Plain reads: pages of a memory map would count as our own memory."""
    view = memoryview(buffer.numpy())
    stream.seek(start)
    while view:
        count = stream.readinto(view)
        if not count:
            raise InputError(f"{stream.name}: became shorter while it was read; is another program writing to it?")
        view = view[count:]
    return buffer


def write_bytes(stream: BinaryIO, data: Tensor) -> None:
    """Write a uint8 tensor to a file."""
    view = memoryview(data.numpy())
    while view:
        view = view[stream.write(view) :]


def typed(data: Tensor, tensor: Stored) -> Tensor:
    """A uint8 tensor of a stored tensor's bytes → the same memory in its dtype and shape."""
    import torch

    return data.view(getattr(torch, DTYPES[tensor.dtype])).view(tensor.shape)


# ---- The plan: which tensor gets which adapter, and every check that needs no weights ------------


class Layer(NamedTuple):
    """A PEFT layer on the meta device, and its adapter tensors by parameter name."""

    module: Any
    adapter: dict[str, Stored]


class NF4(NamedTuple):
    """How training quantized a weight: the dtype it was restored to, and whether the scales were quantized too."""

    dtype: torch.dtype
    double_quant: bool


class Plan(NamedTuple):
    """What merging needs to know before it reads a weight."""

    config: PreTrainedConfig  # of the base
    tensors: dict[str, Stored]  # of the base
    layers: dict[str, Layer]  # by name of the base's weight
    quantized: dict[str, NF4]  # by name of the base's weight, with --base-weights nf4


def plan_merge(adapter: Adapter, base: Path, base_weights: str) -> Plan:
    """Match adapter and base by their headers; InputError if they do not fit each other."""
    check_same_architecture(adapter, base)
    tensors = read_base_headers(base)
    config, model = build_skeleton(base)
    quantized = quantized_weights(adapter, model) if base_weights == "nf4" else {}
    layers = match_layers(adapter, model)
    tied = set(model.all_tied_weights_keys)
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer.", ".")
        if ".lora_" in name or (name in tied and name not in tensors):
            continue
        if name not in tensors:
            raise InputError(f"{base}: no tensor {name} in it; is it a complete model?")
        if list(parameter.shape) != tensors[name].shape:
            raise InputError(f"{base}: {name} is {tensors[name].shape}, but config.json says {list(parameter.shape)}")
    check_tokenizer(adapter, config.vocab_size)
    return Plan(config, tensors, layers, quantized)


def check_same_architecture(adapter: Adapter, base: Path) -> None:
    """Refuse a base whose config.json has another size or type than the base of the training."""
    config, trained_on = read_json(base / "config.json"), read_json(adapter.folder / "config.json")
    if "quantization_config" in config:
        raise InputError(f"{base}: already quantized; name the 16-bit base that it was made from with --base")
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if config.get(key) != trained_on.get(key):
            here, there = config.get(key), trained_on.get(key)
            raise InputError(f"{base}: {key} is {here}, but the adapter's base had {there}; name the right --base")


def check_tokenizer(adapter: Adapter, vocab_size: int) -> None:
    """Refuse a tokenizer that does not fit the base's embedding or lacks the end token."""
    end_token_id(adapter)
    largest = max(adapter.tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise InputError(
            f"{adapter.folder}/tokenizer.json: has token id {largest}, but the base's embedding {vocab_size} rows; "
            "name the right --base"
        )


def end_token_id(adapter: Adapter) -> int:
    """The id of the chat format's end token in the adapter's tokenizer."""
    token = adapter.training["chat_format"]["eos_token"]
    found = adapter.tokenizer.token_to_id(token)
    if found is None:
        raise InputError(
            f"{adapter.folder}/tokenizer.json: has no {token}, the chat format's end token; is it the right adapter?"
        )
    return found


def build_skeleton(base: Path) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The base's config, and its modules on the meta device: shapes and names, no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hint = "{error}; name a causal language model with --base"
    with one_line_errors(base / "config.json", {ValueError: hint, OSError: hint, KeyError: hint}):
        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config)


def match_layers(adapter: Adapter, model: PreTrainedModel) -> dict[str, Layer]:
    """Put PEFT's layers into the skeleton and give each its adapter tensors; every tensor must be used once."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    file = adapter.folder / "adapter_model.safetensors"
    unused = read_header(file)
    # PEFT resolves "all-linear" by the class of a PreTrainedModel, so the skeleton is one.
    with one_line_errors(adapter.folder, {ValueError: "does not fit the base ({error}); name the right --base"}):
        inject_adapter_in_model(LoraConfig.from_pretrained(adapter.folder), model, low_cpu_mem_usage=True)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if type(module) is not Linear or module is model.get_output_embeddings():
            raise InputError(f"{file}: adapts {name}, not a layer between embedding and head; use PEFT's own merge")
        found = {}
        for parameter, value in module.named_parameters():
            if parameter.startswith("base_layer."):
                continue
            key = f"base_model.model.{name}.{parameter.replace('.default', '')}"
            key = key.removesuffix(".weight") if "lora_magnitude_vector" in key else key  # PEFT saves it like this
            if key not in unused:
                raise InputError(f"{file}: no {key} in it; is it complete, and does it belong to this base?")
            if unused[key].shape != list(value.shape):
                here, there = unused[key].shape, list(value.shape)
                raise InputError(f"{file}: {key} is {here}, the base needs {there}; name the right --base")
            found[parameter] = unused.pop(key)
        layers[f"{name}.weight"] = Layer(module, found)
    if unused:
        raise InputError(f"{file}: {min(unused)} fits no layer of the base; name the right --base")
    return layers


def quantized_weights(adapter: Adapter, model: PreTrainedModel) -> dict[str, NF4]:
    """The weights that transformers turns into Linear4bit: all linear layers but the output head."""
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert

    trained = adapter.training.get("quantization") or {}
    if not trained.get("bnb_nf4"):
        raise InputError(f"{adapter.folder}: not trained on NF4 weights; leave out --base-weights nf4")
    nf4 = NF4(getattr(torch, trained["bnb_dtype"]), trained["bnb_double_quant"])
    excluded = set(get_keys_to_not_convert(model))
    return {
        f"{name}.weight": nf4
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in excluded
    }


# ---- Merging -------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Bytes of a shard that are handled at once; a file's header has an empty name."""

    file: Path
    name: str
    start: int
    end: int


def merge_shards(plan: Plan, folder: Path) -> int:
    """Write every shard of the base into `folder`, with the adapted tensors merged. Returns their number.

    A merged tensor has the shape and dtype of the base's, so the header and every offset stay as they are.
    Reading, arithmetic and writing overlap: one thread reads the next piece, one writes the previous one.
    """
    import torch

    pieces = [piece for shard in shards(plan) for piece in shard_pieces(shard, plan)]
    largest = max(piece.end - piece.start for piece in pieces)
    buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(3)]  # read, merged, written
    merged = set()
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # the blocks are small: threads that wait for each other take several times as long
        sources = {s: stack.enter_context(open(s, "rb", buffering=0)) for s in shards(plan)}
        targets = {s: stack.enter_context(open(folder / s.name, "wb", buffering=0)) for s in shards(plan)}
        reader, writer = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))

        def read(number: int) -> Future[Tensor]:
            piece = pieces[number]
            buffer = buffers[number % 3][: piece.end - piece.start]
            return reader.submit(read_bytes, sources[piece.file], piece.start, buffer)

        reading, writing = read(0), None
        for number, piece in enumerate(pieces):
            data = reading.result()
            if number + 1 < len(pieces):
                reading = read(number + 1)
            if piece.name in plan.layers or piece.name in plan.quantized:
                weight = new_weight(typed(data, plan.tensors[piece.name]), piece.name, plan)
                data = weight.flatten().view(torch.uint8)
                merged |= {piece.name} & plan.layers.keys()
            if piece.name and not finite(data, plan.tensors[piece.name].dtype):
                raise InputError(
                    f"{piece.file}: NaN or infinity in {piece.name}, from the base or the adapter; "
                    "download the base or train the adapter again"
                )
            if writing:
                writing.result()
            writing = writer.submit(write_bytes, targets[piece.file], data)
        writing.result()
    assert merged == plan.layers.keys(), f"adapters not used: {sorted(plan.layers.keys() - merged)}"
    return len(merged)


def shards(plan: Plan) -> list[Path]:
    """The base's weight files, in order."""
    return sorted({tensor.file for tensor in plan.tensors.values()})


def shard_pieces(shard: Path, plan: Plan) -> list[Piece]:
    """The header, then the tensors in the file's order: whole if they change, in chunks if they do not."""
    tensors = sorted((t.start, name, t.end) for name, t in plan.tensors.items() if t.file == shard)
    pieces = [Piece(shard, "", 0, tensors[0][0])]
    for start, name, end in tensors:
        step = max(end - start, 1) if name in plan.layers or name in plan.quantized else COPY_CHUNK
        pieces += [Piece(shard, name, at, min(at + step, end)) for at in range(start, end, step)]
    return pieces


def new_weight(weight: Tensor, name: str, plan: Plan) -> Tensor:
    """The merged model's weight for a weight of the base, same shape and dtype."""
    if name in plan.quantized:
        weight = quantize_and_restore(weight, plan.quantized[name])
    return merge_with_peft(plan.layers[name], weight) if name in plan.layers else weight


def quantize_and_restore(weight: Tensor, nf4: NF4) -> Tensor:
    """The weight as a Linear4bit uses it: NF4 in blocks of 64, bitsandbytes' default."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.to(nf4.dtype), blocksize=64, quant_type="nf4", compress_statistics=nf4.double_quant
    )
    return functional.dequantize_4bit(packed, state).to(weight.dtype)


def merge_with_peft(layer: Layer, weight: Tensor) -> Tensor:
    """PEFT's own `merge` of one layer, a block of rows at a time, with real tensors in place of the meta ones.

    Rows of W + s B A, and of DoRA's norms, do not depend on each other. A block whose difference stays in the
    processor's cache takes a fifth of the time of a whole matrix.
    """
    module, values = layer.module, {parameter: adapter_tensor(stored) for parameter, stored in layer.adapter.items()}
    height = max(1, MERGE_BLOCK // weight.shape[1])
    for start in range(0, len(weight), height):
        rows = slice(start, start + height)
        for parameter, value in values.items():
            set_parameter(module, parameter, value if "lora_A" in parameter else value[rows])
        set_parameter(module, "base_layer.weight", weight[rows])
        # merge() of a layer that is still on the meta device would silently do nothing.
        assert not any(value.is_meta for value in module.parameters())
        module.merge()
        module.merged_adapters.clear()
        weight[rows] = module.base_layer.weight
    module.to("meta")
    return weight


def adapter_tensor(stored: Stored) -> Tensor:
    """An adapter's tensor in fp32: PEFT computes in it, whatever the file holds (autocast_adapter_dtype)."""
    import torch

    with open(stored.file, "rb", buffering=0) as stream:
        data = torch.empty(stored.end - stored.start, dtype=torch.uint8)
        return typed(read_bytes(stream, stored.start, data), stored).float()


def set_parameter(module: Any, name: str, value: Tensor) -> None:
    """Replace a parameter by one of another shape or device, which load_state_dict would refuse."""
    import torch

    owner, _, name = name.rpartition(".")
    setattr(module.get_submodule(owner), name, torch.nn.Parameter(value, requires_grad=False))


def finite(data: Tensor, dtype: str) -> bool:
    """Whether these bytes (uint8) hold no NaN or infinity: their bits, read as integers, are the largest of each sign."""
    integer, infinity = INFINITY[dtype]
    bits = data.numpy().view(integer)
    sign_bit = 1 << (8 * bits.itemsize - 1)
    return bool(bits.max() < infinity and bits.view(f"u{integer}").max() < infinity + sign_bit)


# ---- The small files -----------------------------------------------------------------------------


def write_small_files(adapter: Adapter, base: Path, plan: Plan, folder: Path) -> None:
    """Everything except the weights: configs and tokenizer for every reader, licences, the Modelfile."""
    for name in ("model.safetensors.index.json", *LICENCE_FILES):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(adapter.folder / name, folder / name)
    chat_format = adapter.training["chat_format"]
    write_json(folder / "config.json", config_for_all_readers(read_json(base / "config.json"), plan))
    write_json(folder / "generation_config.json", generation_config(base, end_token_id(adapter)))
    tokenizer_config = tokenizer_config_for_all_readers(read_json(adapter.folder / "tokenizer_config.json"))
    write_json(folder / "tokenizer_config.json", {**tokenizer_config, "eos_token": chat_format["eos_token"]})
    num_ctx = min(NUM_CTX, plan.config.max_position_embeddings)
    (folder / "Modelfile").write_text(modelfile(chat_format, num_ctx), encoding="utf-8")


def config_for_all_readers(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The base's config.json with RoPE and dtype in the layout of transformers 5 and in the older one.

    Ollama and llama.cpp read only rope_theta and rope_scaling; without them they silently use theta 10,000.
    """
    rope = dict(plan.config.rope_parameters)
    theta = rope.pop("rope_theta")
    config["rope_parameters"] = {"rope_theta": theta, **rope}
    config["rope_theta"] = theta
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    dtype = config.get("dtype") or config.get("torch_dtype") or DTYPES[next(iter(plan.tensors.values())).dtype]
    config["dtype"] = config["torch_dtype"] = dtype
    config.setdefault("architectures", ["LlamaForCausalLM"] if config["model_type"] == "llama" else None)
    return config


def generation_config(base: Path, end_token: int) -> dict[str, Any]:
    """The base's generation_config.json, with the trained end token among those that end an answer."""
    file = base / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    eos = config.get("eos_token_id", read_json(base / "config.json").get("eos_token_id"))
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    eos = eos if end_token in eos else [*eos, end_token]
    return {**config, "eos_token_id": eos if len(eos) > 1 else eos[0]}


def tokenizer_config_for_all_readers(config: dict[str, Any]) -> dict[str, Any]:
    """Without what only transformers 5 understands, and without a template that Ollama would prefer to ours."""
    for key in ("backend", "is_local", "local_files_only", "chat_template"):
        config.pop(key, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a dict
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return {**config, "tokenizer_class": "PreTrainedTokenizerFast"}


def modelfile(chat_format: dict[str, str], num_ctx: int, source: str = ".") -> str:
    """The Modelfile for a chat format, a context of num_ctx tokens, and a model folder `source`."""
    header = chat_format["header"]
    values = {
        "source": source,
        "header": header.replace("{role}", "{{ .Role }}"),
        "assistant": header.replace("{role}", "assistant"),
        "turn_end": chat_format["turn_end"],
        "answer_end": chat_format["answer_end"],
        "num_ctx": str(num_ctx),
        "stops": "\n".join(f'PARAMETER stop "{stop}"' for stop in stop_texts(chat_format)),
    }
    return re.sub("@([a-z_]+)@", lambda found: values[found[1]], MODELFILE)


def stop_texts(chat_format: dict[str, str]) -> list[str]:
    """The end token, and what opens a turn: a role tag in plain text ends nothing unless it is listed here."""
    header = chat_format["header"]
    if "<|{role}|>" in header:
        opening = [f"<|{role}|>" for role in ("user", "system", "assistant")]
    else:
        opening = [f"<|{part.split('|>')[0]}|>" for part in header.split("<|")[1:]]
    return list(dict.fromkeys([chat_format["eos_token"], *opening]))


# ---- Checks of the result ------------------------------------------------------------------------


def check_result(adapter: Adapter, base: Path, plan: Plan, merged: int, folder: Path) -> list[str]:
    """Check the folder that was written. Returns one line per check; one that fails is a bug of ours."""
    from transformers import AutoConfig

    for shard in shards(plan):
        ours, theirs = read_header(folder / shard.name), read_header(shard)
        assert {n: t[1:] for n, t in ours.items()} == {n: t[1:] for n, t in theirs.items()}, shard.name
    config = read_json(folder / "config.json")
    rope = AutoConfig.from_pretrained(folder).rope_parameters
    old = {**(config["rope_scaling"] or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
    assert rope == old == config["rope_parameters"] == AutoConfig.from_pretrained(base).rope_parameters, rope
    eos = read_json(folder / "generation_config.json")["eos_token_id"]
    assert end_token_id(adapter) in (eos if isinstance(eos, list) else [eos]), eos
    assert "chat_template" not in read_json(folder / "tokenizer_config.json")
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
    used = sum(len(layer.adapter) for layer in plan.layers.values())
    return [
        f"{len(plan.tensors)} tensors with the base's names, shapes and dtypes, no NaN or infinity",
        f"{used} adapter tensors used once each, in {merged} layers",
        f"RoPE in both layouts, theta {config['rope_theta']:g}, as the base; end of answer {eos}",
    ]


def verify(adapter: Adapter, base: Path, plan: Plan, folder: Path, text: str) -> str:
    """Compare base + adapter with the merged folder on a text, token by token. Returns a report."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :1024]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def log_probs(model: PreTrainedModel) -> Tensor:  # (tokens, vocabulary), fp32
        with torch.inference_mode():
            return model.to(device).eval()(input_ids=ids.to(device)).logits[0].float().log_softmax(-1).cpu()

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        for name, nf4 in plan.quantized.items():
            parameter = model.get_parameter(name)
            parameter.copy_(quantize_and_restore(parameter, nf4))
    plain = log_probs(model)
    live = log_probs(PeftModel.from_pretrained(model, adapter.folder))
    del model
    merged = log_probs(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    return compare_log_probs(plain, live, merged)


def compare_log_probs(plain: Tensor, live: Tensor, merged: Tensor) -> str:
    """Log-probabilities (tokens, vocabulary) of the base, of base + adapter and of the merged model → a report.

    The bound is relative, because the noise of rounding is: a merge rounds each weight once more (2⁻⁹ of it in
    bf16), while the adapter's own share varies with the training. What rounding loses must stay below a tenth of
    what the adapter changed, or below 0.01 nats per token: bf16 alone costs 0.004 to 0.006 on SmolLM2 (measured).
    """

    def kl(p: Tensor, q: Tensor) -> float:  # nats per token
        return (p.exp() * (p - q)).sum(-1).mean().item()

    lost, changed = kl(live, merged), kl(live, plain)
    bound = max(0.1 * changed, 0.01)
    agreement = (live.argmax(-1) == merged.argmax(-1)).float().mean().item()
    report = (
        f"KL {lost:.2g} nats/token (bound {bound:.2g}; the adapter changed {changed:.2g}), "
        f"max |Δ log p| {(live - merged).abs().max().item():.2g}, top-1 agreement {agreement:.1%} of {len(live)}"
    )
    if not lost <= bound:  # also when it is NaN
        raise VerificationFailed(f"the merged model is not base + adapter: {report}")
    return report


# ---- The output folder: replaced as a whole, or unchanged ----------------------------------------


def check_output(output: Path, adapter: Path, base: Path, overwrite: bool) -> None:
    """Refuse an output folder that this script did not write, or that holds files it still has to read."""
    old = output.with_name(f"{output.name}.old")
    if old.exists() and not output.exists():  # the last run was killed between its two renames
        old.rename(output)
    for other in (adapter.resolve(), base.resolve()):
        if output == other or output in other.parents:
            raise InputError(f"{output}: holds {other}, which is still needed; choose another --output")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not overwrite:
        raise InputError(f"{output}: already exists; choose another --output, or replace it with --overwrite")
    if output.exists() and not ((output / "Modelfile").is_file() and (output / "config.json").is_file()):
        raise InputError(f"{output}: not created by merge_lora.py; refusing to overwrite it; move it away yourself")


def check_disk(plan: Plan, folder: Path) -> None:
    """Refuse to start if the merged folder, which is as large as the base, will not fit."""
    need = sum(shard.stat().st_size for shard in shards(plan)) + (64 << 20)  # tokenizer and the like
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"{folder}: {gigabytes(free)} free, {gigabytes(need)} needed; make room or choose another --output"
        )


@contextlib.contextmanager
def written_beside(output: Path) -> Iterator[Path]:
    """A folder next to `output` that replaces it if all goes well, and is deleted otherwise."""
    partial, old = (output.with_name(f"{output.name}{end}") for end in (".partial", ".old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for number in (signal.SIGINT, signal.SIGTERM):  # too late to stop
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
def one_line_errors(place: str | Path, hints: dict[type[Exception], str]) -> Iterator[None]:
    """Turn a library's exceptions into an InputError: the first hint whose type fits; {error} is the message."""
    try:
        yield
    except tuple(hints) as error:
        hint = next(text for kind, text in hints.items() if isinstance(error, kind))
        message = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"{place}: {hint.format(error=message)}") from None


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
