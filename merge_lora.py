#!/usr/bin/env python3
"""Merge a trained LoRA adapter into its base model: one folder that transformers, llama.cpp and Ollama read.

    python3 merge_lora.py                       # runs_dolores_v5/llama31_clean → dolores_v5_full
    python3 merge_lora.py --adapter A --base B --output C --overwrite --verify
    ollama create dolores-v5 -f dolores_v5_full/Modelfile

The base is streamed: each shard is copied byte for byte, and only the tensors that have an adapter are
replaced on the way, one at a time. Peak memory is a few copies of the largest of those tensors, whatever
the model's size, and no GPU is needed. The arithmetic is PEFT's own.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "training_args.json", "config.json",
                 "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE")  # must travel with the weights
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names and torch's
CHUNK = 16 << 20  # bytes; tensors without an adapter are copied in pieces of this size
BLOCK = 1 << 18  # weights merged at once
NUM_CTX = 8192  # Ollama's context window, unless the base has less

# What may be set in adapter_config.json. Anything else that is switched on changes the result in a way
# that merging tensor by tensor would lose (modules_to_save, biases, trained tokens, replicated layers …).
UNDERSTOOD = {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
              "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
              "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
              "target_modules", "task_type", "use_dora", "use_rslora"}  # fmt: skip

# Held-out text for --verify. It stands in no corpus: it was written for this file.
VERIFY_TEXT = """Le train de nuit entra en gare avec vingt minutes de retard. Sur le quai, une femme tenait un parapluie
rouge et regardait sa montre sans impatience ; elle avait appris depuis longtemps que les horaires sont des promesses.

Pour faire une bonne soupe à l'oignon, il faut surtout du temps. On coupe les oignons finement, on les laisse fondre
dans le beurre pendant quarante minutes, puis on ajoute le bouillon, une feuille de laurier et un peu de vin blanc.

– Pourquoi le ciel est-il bleu ? demanda l'enfant.
– Parce que l'air disperse mieux la lumière bleue que la rouge, répondit sa grand-mère. Le soir, la lumière traverse
plus d'air, le bleu s'est perdu en route, et il ne reste que l'orange et le rouge."""


class InputError(Exception):
    """Something the user can mend: `place: what; what to do` on one line, exit status 2."""


class VerificationFailed(Exception):
    """The merged folder does not answer like base + adapter: exit status 1, nothing is put in place."""


class Stopped(BaseException):
    """SIGINT or SIGTERM came; the argument is its number."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; every default is the documented run's."""
    parser = argparse.ArgumentParser(
        description="Merge a LoRA adapter into its base model, for transformers, llama.cpp and Ollama.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--adapter", type=Path, default=Path("runs_dolores_v5/llama31_clean"), metavar="DIR",
                        help="folder that train_sft_dolores.py wrote")  # fmt: skip
    parser.add_argument("--base", metavar="DIR_OR_ID", help="base model, instead of the one the adapter names")
    parser.add_argument("--output", type=Path, default=Path("dolores_v5_full"), metavar="DIR", help="merged folder")
    parser.add_argument("--base-weights", choices=("original", "nf4"), default="original",
                        help="merge into the base as published, or as NF4 training saw it (quantised and restored)")  # fmt: skip
    parser.add_argument("--verify", nargs="?", const="", metavar="TEXT_FILE",
                        help="compare the result with base + adapter on held-out text (needs memory for the model)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge in the output folder")
    return parser.parse_args(argv)


# ---- the adapter folder, and the base that it names ----


class Adapter(NamedTuple):
    """The folder that training wrote: the contract between the two scripts."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json, as PEFT wrote it
    training: dict[str, Any]  # training_args.json: chat_format, base, quantization


def read_adapter(folder: Path) -> Adapter:
    """The adapter folder, complete and of a kind that can be merged; InputError otherwise."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train one with train_sft_dolores.py, or name it with --adapter")
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing; train_sft_dolores.py writes it when training has ended")
    adapter = Adapter(folder, read_json(folder / "adapter_config.json"), read_json(folder / "training_args.json"))
    for key, inner in (("chat_format", ("header", "turn_end", "answer_end", "eos_token")), ("base", ("model",))):
        if not isinstance(adapter.training.get(key), dict) or any(k not in adapter.training[key] for k in inner):
            raise InputError(f"{folder}/training_args.json: no {key} in it; train_sft_dolores.py writes it")
    refuse_what_cannot_be_merged(adapter)
    return adapter


def refuse_what_cannot_be_merged(adapter: Adapter) -> None:
    """Whatever is set in adapter_config.json and not in UNDERSTOOD would be lost in silence."""
    place, config = adapter.folder / "adapter_config.json", adapter.config
    if config.get("peft_type") != "LORA":
        raise InputError(f"{place}: a {config.get('peft_type')} adapter; only LoRA, rsLoRA and DoRA can be merged here")
    # PiSSA, OLoRA, LoftQ and the like change the base when training starts: the published base no longer fits.
    if (init := config.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        raise InputError(f"{place}: init_lora_weights {init!r} has changed the base; use PEFT's own merge_and_unload")
    for key in sorted(config.keys() - UNDERSTOOD - {"init_lora_weights"}):
        if config[key] and config[key] != "none":
            raise InputError(f"{place}: {key} is set, which this merge would lose; use PEFT's own merge_and_unload")


def find_base(named: str | None, adapter: Adapter) -> Path:
    """The base's folder: a local one as it is, a Hub id through the Hugging Face cache, at the trained revision."""
    recorded = adapter.training["base"]
    model = named or recorded["model"]
    if Path(model).is_dir():
        return Path(model)
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        hint = "name it with --base" if named is None else "--base takes a folder or a Hugging Face id"
        raise InputError(f"{model}: no such base folder; {hint}")

    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                # A commit of another model means nothing here.
                revision=recorded.get("revision") if model == recorded["model"] else None,
                allow_patterns=["*.json", "*.safetensors", *LICENCE_FILES],
                ignore_patterns=["*/*"],
            )
        )
    except errors.GatedRepoError:
        raise InputError(
            f"{model}: gated; accept its licence on huggingface.co/{model}, then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{model}: no revision {recorded.get('revision')} on the Hub; name a local --base") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{model}: unknown to the Hub; check the name, `hf auth login`, or name a local --base"
        ) from None
    except errors.HFValidationError:
        raise InputError(f"{model}: neither a folder nor a Hugging Face id; name the base with --base") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError):
        raise InputError(
            f"{model}: not in the cache and the Hub is out of reach; name a local folder by --base"
        ) from None


# ---- safetensors, as bytes: 8 bytes of length, a JSON header, the data ----


class Stored(NamedTuple):
    """A tensor in a safetensors file; start and end count bytes from the file's beginning."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    end: int


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file by name; a file that was cut off is an InputError."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(data - 8)) if 8 < data <= size else None
        except ValueError:
            header = None
    if header is None or size != data + max((t["data_offsets"][1] for t in header.values() if "dtype" in t), default=0):
        raise InputError(f"{file}: cut off, or no safetensors file; copy or download it again")
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
    return tensors


def read_bytes(stream: BinaryIO, start: int, buffer):
    """Fill a uint8 tensor from a file, by plain reads: the pages of an mmap would count as memory of ours."""
    view = memoryview(buffer.numpy())
    stream.seek(start)
    while view:
        count = stream.readinto(view)
        if not count:
            raise InputError(f"{stream.name}: shorter than a moment ago; is something else writing to it?")
        view = view[count:]
    return buffer


def typed(buffer, tensor: Stored):
    """A uint8 tensor of a stored tensor's bytes → the same memory in its dtype and shape."""
    import torch

    return buffer.view(getattr(torch, FLOATS[tensor.dtype])).view(tensor.shape)


# ---- the plan: which tensor gets which adapter, every check that needs no weights ----


class Layer(NamedTuple):
    """A PEFT layer on the meta device, and its adapter tensors by parameter name."""

    module: Any
    adapter: dict[str, Stored]


class Plan(NamedTuple):
    """All that merging needs to know before it reads a weight."""

    config: Any  # the base's, as transformers reads it
    tensors: dict[str, Stored]  # the base's
    layers: dict[str, Layer]  # by name of the base's weight
    quantized: dict[str, dict]  # weight name → arguments of as_trained, with --base-weights nf4


def plan_merge(adapter: Adapter, base: Path, base_weights: str) -> Plan:
    """Match adapter and base by their headers; whatever does not fit is an InputError."""
    config_file = read_json(base / "config.json")
    if "quantization_config" in config_file:
        raise InputError(f"{base}: quantised already; name the 16-bit base that it was made from with --base")
    trained_on = read_json(adapter.folder / "config.json")
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if config_file.get(key) != trained_on.get(key):
            here, there = config_file.get(key), trained_on.get(key)
            raise InputError(f"{base}: {key} is {here}, but the adapter's base had {there}; name the right --base")

    tensors = read_base_headers(base)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise InputError(f"{tensor.file}: {name} is {tensor.dtype}; a base of bf16, f16 or f32 weights is needed")
    config, model = skeleton(base)
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
    return Plan(config, tensors, layers, quantized)


def skeleton(base: Path):
    """The base's modules on the meta device: shapes and names, no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{base}/config.json: {first_line(error)}; name a causal language model by --base") from None


def match_layers(adapter: Adapter, model) -> dict[str, Layer]:
    """Put PEFT's layers into the skeleton and give each its tensors; what is left over is an error."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    file = adapter.folder / "adapter_model.safetensors"
    left = read_header(file)
    # "all-linear" is resolved by PEFT from the class of a PreTrainedModel, so the skeleton must be one: it is.
    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(adapter.folder), model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InputError(
            f"{adapter.folder}: does not fit the base ({first_line(error)}); name the right --base"
        ) from None
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
            key = key.removesuffix(".weight") if "lora_magnitude_vector" in key else key  # PEFT saves it so
            if key not in left:
                raise InputError(f"{file}: no {key} in it; is it whole, and does it belong to this base?")
            if left[key].shape != list(value.shape):
                raise InputError(f"{file}: {key} is {left[key].shape}, the base needs {list(value.shape)}; wrong base?")
            found[parameter] = left.pop(key)
        layers[f"{name}.weight"] = Layer(module, found)
    if left:
        raise InputError(f"{file}: {min(left)} has no place in the base; name the right --base")
    return layers


def quantized_weights(adapter: Adapter, model) -> dict[str, dict]:
    """The weights that transformers turns into Linear4bit: all linear layers but the output head."""
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert

    trained = adapter.training.get("quantization") or {}
    if not trained.get("bnb_nf4"):
        raise InputError(f"{adapter.folder}: not trained on NF4 weights; leave out --base-weights nf4")
    dtype = getattr(torch, trained["bnb_dtype"])
    kept = set(get_keys_to_not_convert(model))
    return {
        f"{name}.weight": {"dtype": dtype, "double_quant": trained["bnb_double_quant"]}
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in kept
    }


# ---- merging ----


def merge_shards(plan: Plan, folder: Path) -> int:
    """Write every shard of the base into `folder`, the adapted tensors merged. Returns the number of those.

    A merged tensor has the shape and dtype of the base's, so the header and every offset stay as they are.
    Reading, arithmetic and writing overlap: one thread reads ahead, one writes behind (benchmarks/merge.py).
    """
    import torch

    pieces = [piece for shard in shards(plan) for piece in shard_pieces(shard, plan)]
    largest = max(piece.end - piece.start for piece in pieces)
    buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(3)]  # one read, one merged, one written
    layers, count = dict(plan.layers), 0
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # two that meet after every small block take several times as long
        sources = {s: stack.enter_context(open(s, "rb", buffering=0)) for s in shards(plan)}
        targets = {s: stack.enter_context(open(folder / s.name, "wb", buffering=0)) for s in shards(plan)}
        reader, writer = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))

        def read(number: int) -> Future:
            piece = pieces[number]
            buffer = buffers[number % 3][: piece.end - piece.start]
            return reader.submit(read_bytes, sources[piece.file], piece.start, buffer)

        ahead, behind = read(0), None
        for number, piece in enumerate(pieces):
            data = ahead.result()
            ahead = read(number + 1) if number + 1 < len(pieces) else None
            if piece.name in layers or piece.name in plan.quantized:
                data = new_weight(typed(data, plan.tensors[piece.name]), piece.name, layers.pop(piece.name, None), plan)
                count += piece.name in plan.layers
            if piece.name and not finite(data, FLOATS[plan.tensors[piece.name].dtype]):
                raise InputError(
                    f"{piece.file}: NaN or infinity in {piece.name}, base or adapter; train or fetch it anew"
                )
            if behind:
                behind.result()
            behind = writer.submit(write_bytes, targets[piece.file], data)
        behind.result()
    assert not layers, f"adapter tensors left over: {sorted(layers)}"  # each was taken out as it was used
    return count


def shards(plan: Plan) -> list[Path]:
    """The base's weight files, in order."""
    return sorted({tensor.file for tensor in plan.tensors.values()})


class Piece(NamedTuple):
    """Bytes of a shard that are handled at once; a header has no name."""

    file: Path
    name: str
    start: int
    end: int


def shard_pieces(shard: Path, plan: Plan) -> list[Piece]:
    """The header, then the tensors as they lie in the file: whole if they change, in chunks if they do not."""
    tensors = sorted((t.start, name, t.end) for name, t in plan.tensors.items() if t.file == shard)
    pieces = [Piece(shard, "", 0, tensors[0][0])]
    for start, name, end in tensors:
        step = max(end - start, 1) if name in plan.layers or name in plan.quantized else CHUNK
        pieces += [Piece(shard, name, at, min(at + step, end)) for at in range(start, end, step)]
    return pieces


def new_weight(weight, name: str, layer: Layer | None, plan: Plan):
    """A base weight → what stands in its place in the merged model, same shape and dtype."""
    if name in plan.quantized:
        weight = as_trained(weight, **plan.quantized[name])
    return weight if layer is None else merge_with_peft(layer, weight)


def as_trained(weight, dtype, double_quant: bool):
    """The weight as a Linear4bit gives it back: NF4 in blocks of 64, bitsandbytes' default."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.to(dtype), blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    return functional.dequantize_4bit(packed, state).to(weight.dtype)


def merge_with_peft(layer: Layer, weight):
    """PEFT's own `merge` of one layer, a block of rows at a time, with real tensors in place of the meta ones.

    Rows of W + s B A, and of DoRA's norms, do not depend on each other. A block whose difference stays in the
    processor's cache takes a fifth of the time of a whole matrix.
    """
    module, values = layer.module, {parameter: adapter_tensor(stored) for parameter, stored in layer.adapter.items()}
    height = max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), height):
        rows = slice(start, start + height)
        for parameter, value in values.items():
            put(module, parameter, value if "lora_A" in parameter else value[rows])
        put(module, "base_layer.weight", weight[rows])
        # On a layer that still lies on the meta device, merge() does nothing, in silence.
        assert not any(value.is_meta for value in module.parameters())
        module.merge()
        module.merged_adapters.clear()
        weight[rows] = module.base_layer.weight
    module.to("meta")
    return weight


def adapter_tensor(stored: Stored):
    """An adapter's tensor in fp32: PEFT computes so, whatever the file holds (autocast_adapter_dtype)."""
    import torch

    with open(stored.file, "rb", buffering=0) as stream:
        buffer = torch.empty(stored.end - stored.start, dtype=torch.uint8)
        return typed(read_bytes(stream, stored.start, buffer), stored).float()


def put(module, name: str, value) -> None:
    """Set a parameter of another shape or device than the one that is there, which load_state_dict would refuse."""
    import torch

    owner, _, name = name.rpartition(".")
    setattr(module.get_submodule(owner), name, torch.nn.Parameter(value, requires_grad=False))


def finite(data, dtype: str) -> bool:
    """No NaN or infinity: their bits, read as whole numbers, are the largest of either sign."""
    import torch

    infinity = torch.tensor(float("inf"), dtype=getattr(torch, dtype))
    bits = f"int{8 * infinity.itemsize}"
    positive = infinity.view(getattr(torch, bits)).item()
    numbers = data.view(getattr(torch, bits)).numpy()
    return bool(
        numbers.max() < positive and numbers.view(f"u{bits}").max() < positive + (1 << (8 * infinity.itemsize - 1))
    )


def write_bytes(stream: BinaryIO, data) -> None:
    """Write a tensor's memory to a file."""
    import torch

    view = memoryview(data.flatten().view(torch.uint8).numpy())
    while view:
        view = view[stream.write(view) :]


# ---- the small files ----


def write_small_files(adapter: Adapter, base: Path, plan: Plan, folder: Path) -> None:
    """All but the weights: configs and tokenizer for every reader, licences, the Modelfile."""
    for name in ("model.safetensors.index.json", *LICENCE_FILES):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(adapter.folder / name, folder / name)
    chat_format = adapter.training["chat_format"]
    write_json(folder / "config.json", config_for_all_readers(read_json(base / "config.json"), plan))
    write_json(folder / "generation_config.json", generation_config(base, adapter))
    tokenizer_config = tokenizer_config_for_all_readers(read_json(adapter.folder / "tokenizer_config.json"))
    write_json(folder / "tokenizer_config.json", {**tokenizer_config, "eos_token": chat_format["eos_token"]})
    (folder / "Modelfile").write_text(modelfile(chat_format, num_ctx(plan)), encoding="utf-8")


def config_for_all_readers(config: dict, plan: Plan) -> dict:
    """The base's config.json with RoPE and dtype in the layouts of transformers 5 and of everything older.

    Ollama and llama.cpp read only rope_theta and rope_scaling; without them they take theta 10,000, in silence.
    """
    rope = dict(plan.config.rope_parameters)
    theta = rope.pop("rope_theta")
    config["rope_parameters"] = {"rope_theta": theta, **rope}
    config["rope_theta"] = theta
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    dtype = config.get("dtype") or config.get("torch_dtype") or FLOATS[next(iter(plan.tensors.values())).dtype]
    config["dtype"] = config["torch_dtype"] = dtype
    config.setdefault("architectures", ["LlamaForCausalLM"] if config["model_type"] == "llama" else None)
    return config


def generation_config(base: Path, adapter: Adapter) -> dict:
    """The base's, with the end token that was trained among those that end an answer."""
    file = base / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    eos = config.get("eos_token_id", read_json(base / "config.json").get("eos_token_id"))
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    trained = eos_id(adapter)
    eos = eos if trained in eos else [*eos, trained]
    return {**config, "eos_token_id": eos if len(eos) > 1 else eos[0]}


def eos_id(adapter: Adapter) -> int:
    """The id of the chat format's end token in the adapter's tokenizer."""
    from tokenizers import Tokenizer

    token = adapter.training["chat_format"]["eos_token"]
    found = Tokenizer.from_file(str(adapter.folder / "tokenizer.json")).token_to_id(token)
    if found is None:
        raise InputError(
            f"{adapter.folder}/tokenizer.json: has no {token}, the chat format's end token; wrong adapter?"
        )
    return found


def tokenizer_config_for_all_readers(config: dict) -> dict:
    """Without what only transformers 5 understands, and without a template that Ollama would prefer to ours."""
    for key in ("backend", "is_local", "local_files_only", "chat_template"):
        config.pop(key, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 wants a dict there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return {**config, "tokenizer_class": "PreTrainedTokenizerFast"}


def num_ctx(plan: Plan) -> int:
    """Ollama's context window in tokens."""
    return min(NUM_CTX, plan.config.max_position_embeddings)


def modelfile(chat_format: dict[str, str], num_ctx: int, source: str = ".") -> str:
    """What `ollama create` reads. The TEMPLATE says in Go what chat_template.jinja says in Jinja.

    With `.Prompt` alone Ollama would leave the end token out of earlier answers, hence `.Messages`. A last
    message of the assistant is the beginning of the answer to come and stays open.
    """
    header, turn_end, answer_end = (chat_format[key] for key in ("header", "turn_end", "answer_end"))
    opened = header.replace("{role}", "{{ .Role }}")
    assistant = header.replace("{role}", "assistant")
    return f'''FROM {source}

TEMPLATE """{{{{- range $i, $_ := .Messages }}}}
{{{{- $last := eq (len (slice $.Messages $i)) 1 -}}}}
{opened}{{{{ .Content }}}}{{{{ if eq .Role "assistant" }}}}{{{{ if not $last }}}}{answer_end}{{{{ end }}}}{{{{ else }}}}{turn_end}{{{{ if $last }}}}{assistant}{{{{ end }}}}{{{{ end }}}}
{{{{- end }}}}"""

PARAMETER temperature 0.7
PARAMETER num_ctx {num_ctx}
''' + "".join(f'PARAMETER stop "{stop}"\n' for stop in stops(chat_format))


def stops(chat_format: dict[str, str]) -> list[str]:
    """The end token, and whatever opens a turn: a role tag of plain text ends nothing unless it is named here."""
    header = chat_format["header"]
    if "<|{role}|>" in header:
        opening = [f"<|{role}|>" for role in ("user", "system", "assistant")]
    else:
        opening = [f"<|{part.split('|>')[0]}|>" for part in header.split("<|")[1:]]
    return list(dict.fromkeys([chat_format["eos_token"], *opening]))


# ---- checks: always ----


def check_before(adapter: Adapter, plan: Plan) -> None:
    """What can be said of the tokenizer without a weight: it must fit the embedding."""
    from tokenizers import Tokenizer

    eos_id(adapter)
    rows = plan.config.vocab_size
    largest = max(Tokenizer.from_file(str(adapter.folder / "tokenizer.json")).get_vocab().values())
    if largest >= rows:
        raise InputError(f"{adapter.folder}/tokenizer.json: has token {largest}, the base's embedding {rows} rows")


def check_after(adapter: Adapter, base: Path, plan: Plan, merged: int, folder: Path) -> list[str]:
    """Look at the folder that was written. Each line returned is a check that held; one that fails is our mistake."""
    from transformers import AutoConfig

    for shard in shards(plan):
        ours, theirs = read_header(folder / shard.name), read_header(shard)
        assert {n: t[1:] for n, t in ours.items()} == {n: t[1:] for n, t in theirs.items()}, shard.name
    config = read_json(folder / "config.json")
    rope = AutoConfig.from_pretrained(folder).rope_parameters
    old = {**(config["rope_scaling"] or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
    assert rope == old == config["rope_parameters"] == AutoConfig.from_pretrained(base).rope_parameters, rope
    eos = read_json(folder / "generation_config.json")["eos_token_id"]
    assert eos_id(adapter) in (eos if isinstance(eos, list) else [eos]), eos
    assert "chat_template" not in read_json(folder / "tokenizer_config.json")
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
    used = sum(len(layer.adapter) for layer in plan.layers.values())
    return [
        f"{len(plan.tensors)} tensors with the base's names, shapes and dtypes, no NaN or infinity",
        f"{used} adapter tensors used once each, in {merged} layers",
        f"RoPE in both layouts, theta {config['rope_theta']:g}, as the base; end of answer {eos}",
    ]


# ---- checks: on demand ----


def verify(adapter: Adapter, base: Path, plan: Plan, folder: Path, text_file: str) -> str:
    """Compare base + adapter with the merged folder on text, token by token; also what the adapter changed at all."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT 0.21 asks
    text = read_text(Path(text_file)) if text_file else VERIFY_TEXT
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :1024]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def log_probs(model):
        with torch.inference_mode():
            return model.to(device).eval()(input_ids=ids.to(device)).logits[0].float().log_softmax(-1).cpu()

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        for name, arguments in plan.quantized.items():
            parameter = model.get_parameter(name)
            parameter.copy_(as_trained(parameter, **arguments))
    plain = log_probs(model)
    live = log_probs(PeftModel.from_pretrained(model, adapter.folder))
    del model
    merged = log_probs(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    return judge(plain, live, merged)


def judge(plain, live, merged) -> str:
    """Log-probabilities (tokens, vocabulary) of the base, of base + adapter and of the merged model → a report.

    The bound is relative, because the noise of rounding is: a merge rounds each weight once more (2⁻⁹ of it in
    bf16), while the adapter's own share varies with the training. What rounding loses must stay below a tenth of
    what the adapter changed, or below 0.01 nats per token, the noise of bf16 itself on a small model (0.004 to 0.006 measured on SmolLM2).
    """

    def kl(p, q) -> float:  # nats per token
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


# ---- nothing half done ----


def check_output(output: Path, adapter: Path, base: Path, overwrite: bool) -> None:
    """Refuse an output folder that is not ours to replace, or that holds what is still read."""
    old = output.with_name(f"{output.name}.old")
    if old.exists() and not output.exists():  # the last run was killed between its two renames
        old.rename(output)
    for other in (adapter.resolve(), base.resolve()):
        if output == other or output in other.parents:
            raise InputError(f"{output}: holds {other}, which is still needed; choose another --output")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; choose another --output, or replace it with --overwrite")
    if output.exists() and not ((output / "Modelfile").is_file() and (output / "config.json").is_file()):
        raise InputError(f"{output}: was not written by merge_lora.py, so --overwrite leaves it; move it away yourself")


def check_disk(plan: Plan, folder: Path) -> None:
    """Refuse to begin what cannot be finished: the merged folder is as large as the base."""
    need = sum(shard.stat().st_size for shard in shards(plan)) + (64 << 20)  # tokenizer and the like
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(f"{folder}: {gigabytes(free)} free, {gigabytes(need)} needed; make room or choose --output")


@contextlib.contextmanager
def written_beside(output: Path):
    """A folder beside `output`, which takes its place when everything went well and vanishes otherwise."""
    partial, old = (output.with_name(f"{output.name}{end}") for end in (".partial", ".old"))
    for debris in (partial, old):
        shutil.rmtree(debris, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for name in (signal.SIGINT, signal.SIGTERM):  # too late to stop
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(name, signal.SIG_IGN)
        if output.exists():
            output.rename(old)
        partial.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- small helpers ----


def read_text(file: Path) -> str:
    """A UTF-8 file's text; InputError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}; name a readable file"
        ) from None


def read_json(file: Path) -> dict:
    """A JSON file's content; InputError with its line where it is none."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: not JSON ({error.msg}); copy or write it again") from None


def write_json(file: Path, content: dict) -> None:
    """Write a dict as readable UTF-8 JSON."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def first_line(error: Exception) -> str:
    """A library's error in one line, without its full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")


def gigabytes(size: float) -> str:
    """Bytes as text, in GB of 10^9."""
    return f"{size / 1e9:.2f} GB"


def main(argv: list[str] | None = None) -> None:
    """The whole story; exceptions tell how it ended."""
    args = parse_args(argv)
    start, output = time.monotonic(), args.output.resolve()
    adapter = read_adapter(args.adapter)
    base = find_base(args.base, adapter)
    check_output(output, adapter.folder, base, args.overwrite)
    if args.verify:
        read_text(Path(args.verify))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: fewer faults in fresh buffers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which PEFT imports, and which misses its CPU kernels
    plan = plan_merge(adapter, base, args.base_weights)
    check_before(adapter, plan)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_disk(plan, output.parent)

    size = gigabytes(sum(tensor.end - tensor.start for tensor in plan.tensors.values()))
    print(f"merging    {adapter.folder} into {base} ({size}, {args.base_weights} weights)", flush=True)
    with written_beside(output) as folder:
        merged = merge_shards(plan, folder)
        write_small_files(adapter, base, plan, folder)
        checks = check_after(adapter, base, plan, merged, folder)
        if args.verify is not None:
            checks.append(verify(adapter, base, plan, folder, args.verify))
    print(f"written    {args.output} ({size}) in {time.monotonic() - start:.0f} s")
    for check in checks:
        print(f"checked    {check}")
    print(f"next       ollama create dolores-v5 -f {args.output}/Modelfile")


def run() -> int:
    """main, with each ending as one line and an exit status."""

    def stop(number, _frame):
        raise Stopped(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except InputError as problem:
        print(problem, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"{error.filename or 'output'}: {error.strerror}; nothing was put in place", file=sys.stderr)
        return 2
    except VerificationFailed as failed:
        print(failed, file=sys.stderr)
        return 1
    except Stopped as stopped:
        print("stopped; what was written is removed, an earlier merge is untouched", file=sys.stderr)
        return 128 + stopped.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(run())
