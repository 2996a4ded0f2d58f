#!/usr/bin/env python3
"""Arithmetic per token and bytes kept per layer for Llama-3.1-8B's real shape, ours beside the usual ways. No GPU.

    python benchmarks/flops.py                       # one row of 2048 tokens, four documents, 64 % trained
    python benchmarks/flops.py --documents 2048 --trained 1

The real modules run on fake tensors: shapes without memory. FlopCounterMode counts every matrix product that runs,
saved_tensors_hooks every byte that autograd keeps. NF4 linears are plain frozen ones here, with bitsandbytes' casts
around them: unpacking a weight is not a matrix product. Attention is counted as its CUDA kernel works: a causal kernel
the lower triangle of each document, a kernel with a mask the whole square of the row.
- plain Trainer: prepare_model_for_kbit_training, bf16 autocast, all layers checkpointed, one conversation at a time.
- TRL 1.16: SFTTrainer as it runs on CUDA: packed rows with a mask, all layers checkpointed (its default), bf16
  adapters, the head on trained tokens, whose logits its backward computes a second time.
- ours: train_sft_dolores.py's own functions; the checkpointed layers are those that a 24 GB card needs.
"""

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LLAMA_31_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
DOCUMENTS = [896, 575, 352, 225]  # the 90th, 75th, 30th and 10th percentile of train.chatml: one full row
TRAINED = 0.64  # share of trained tokens in train.chatml with Llama 3.1's vocabulary
CARD_GIB, FRACTION = 24.0, 0.95
MARGIN_GIB = 1.0  # for fragmentation


def attention_for(kind: str) -> str:
    """Register `counted`, also in place of the trainer's `packed`: the kernel that CUDA would choose, by its shapes."""
    import torch
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface, AttentionMaskInterface

    def counted(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if kind == "mask":  # sdpa with a mask: grouped heads repeated, mask made additive, memory-efficient kernel
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            bias = query.new_empty(1, 1, query.shape[2], query.shape[2]).expand(1, query.shape[1], -1, -1)
            out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]
            return out.transpose(1, 2), None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends = torch.zeros(2, dtype=torch.int32, device=query.device)
        out = varlen_attn(q, k, v, ends, ends, len(q), len(q), scale=scaling, window_size=(-1, 0), enable_gqa=True)
        return out[None], None

    for name in ("packed", "counted"):
        AttentionInterface.register(name, counted)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return "counted"


def causal_flops(documents: list[int]) -> dict:
    """FlopCounterMode formulas of varlen_attn: the triangle of each document, forward 2 products, backward 5."""
    import torch

    triangle = sum(length * (length + 1) // 2 for length in documents)

    def forward(query, *args, out_val=None, **kwargs):
        return 4 * triangle * query[-2] * query[-1]

    def backward(grad, query, *args, out_val=None, **kwargs):
        return 10 * triangle * query[-2] * query[-1]

    ops = torch.ops.torch_attn
    return {ops._varlen_attn: forward, ops._varlen_attn_backward: backward}


def frozen_4bit(model):
    """Let the projections cast as bitsandbytes' Linear4bit does: compute in bf16, answer in the input's dtype."""
    import torch

    class Linear4bit(torch.nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return torch.nn.functional.linear(x.to(torch.bfloat16), self.weight).to(x.dtype)

    for module in model.get_decoder().layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Linear4bit
            module.weight = torch.nn.Parameter(module.weight.detach().to(torch.bfloat16), requires_grad=False)


def base_model(config: dict, attention: str):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**config), dtype=torch.bfloat16, attn_implementation=attention
        )
    model.config.use_cache = False
    return model.requires_grad_(False).train()


def to_fake(model) -> None:
    """Replace meta tensors by fake ones on a `cpu` (the meta device knows no autocast), dropout by CUDA's kernel."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # a CPU's keeps its mask in bf16, CUDA's in one byte
            module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0]
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    tensors[name] = (
                        torch.nn.Parameter(fake, value.requires_grad) if name in module._parameters else fake
                    )


def checkpoint(model, k: int) -> None:
    """Checkpoint the first `k` layers, as the trainer does."""
    import train_sft_dolores as trainer

    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    layers = base.get_decoder().layers
    trainer.checkpoint_layers(layers, len(layers) - k)


def ours(config: dict, args, k: int):
    """(model, loss of a batch, autocast) as train_sft_dolores.py has them on CUDA."""
    import train_sft_dolores as trainer

    options = ["--model", "8B", "--lora-r", str(args.r), "--lora-dropout", str(args.dropout)]
    options = trainer.parse_args([*options, "--lora-alpha", str(2 * args.r)])
    model = base_model(config, trainer.packed_attention())
    attention_for("varlen")
    frozen_4bit(model)
    trainer.lose_on_trained_tokens(model)
    model = trainer.add_lora(model, options, None).train()
    checkpoint(model, k)

    def loss(batch):
        return model(**{name: value for name, value in batch.items() if name != "documents"}).loss

    return model, loss, contextlib.nullcontext()


def lora(args):
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(
        task_type="CAUSAL_LM", r=args.r, lora_alpha=2 * args.r, lora_dropout=args.dropout, target_modules=targets
    )


def plain(config: dict, args, k: int):
    """The usual QLoRA script: everything that is not NF4 becomes float32, the head sees every token."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = base_model(config, attention_for("varlen"))  # a lone conversation needs no mask: the causal kernel
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model)
    frozen_4bit(model)
    model = get_peft_model(model, lora(args)).train()
    checkpoint(model, k)

    def loss(batch):
        labels = torch.zeros_like(batch["input_ids"])
        return model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss

    return model, loss, torch.autocast("cpu", torch.bfloat16)


def trl(config: dict, args, k: int):
    """TRL 1.16's SFTTrainer on CUDA; its head keeps no logits and computes them again in backward."""
    import torch
    import torch.nn.functional as F
    from peft import get_peft_model
    from torch.utils.checkpoint import checkpoint as again

    model = base_model(config, attention_for("mask"))
    frozen_4bit(model)
    model = get_peft_model(model, lora(args)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    checkpoint(model, k)
    base = model.get_base_model()

    def head(hidden, targets):
        return F.cross_entropy(base.lm_head(hidden).float(), targets)

    def loss(batch):
        hidden = base.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        hidden = hidden.last_hidden_state[0].index_select(0, batch["logits_to_keep"])
        return again(head, hidden, batch["shift_labels"][0], use_reentrant=False)

    return model, loss, torch.autocast("cpu", torch.bfloat16)


VARIANTS = {"plain Trainer": plain, "TRL 1.16": trl, "ours": ours}


def batch_of(documents: list[int], trained: float) -> dict:
    """A collated row of these lengths whose last `trained` share is trained, in every document."""
    import numpy as np

    import train_sft_dolores as trainer

    ids = [np.arange(length, dtype=np.int32) for length in documents]
    labels = [
        np.where(np.arange(n) >= round((1 - trained) * n), i, trainer.IGNORE)
        for n, i in zip(documents, ids, strict=True)
    ]
    row = {"input_ids": ids, "labels": labels, "file": [""] * len(ids), "line": [0] * len(ids)}
    return trainer.collate([row])


def count(make, config: dict, args, k: int, documents: list[int]) -> tuple[dict, dict]:
    """({kind of product: FLOPs of one forward and backward}, {dtype: bytes a layer keeps}) of one row."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    batch = batch_of(documents, args.trained)
    model, loss, autocast = make(config, args, k)
    with FakeTensorMode() as fake:
        batch = {name: fake.from_tensor(x) if torch.is_tensor(x) else x for name, x in batch.items()}
        to_fake(model)
        counter = FlopCounterMode(display=False, custom_mapping=causal_flops(documents))
        # Counts by module are of no use here, and its tracker forbids autograd.grad inside a function.
        counter.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda: None)
        with counter:
            with autocast:
                value = loss(batch)
            value.backward()
        counts = counter.get_flop_counts()["Global"]
        kept = kept_by_layer(model, loss, batch, autocast)
    attention = sum(flops for op, flops in counts.items() if "attn" in str(op) or "attention" in str(op))
    return {"attention": attention, "rest": sum(counts.values()) - attention}, kept


def kept_by_layer(model, loss, batch: dict, autocast) -> dict:
    """{dtype: bytes} that one layer's forward keeps for backward when it is not checkpointed."""
    import torch

    layers = model.get_base_model().get_decoder().layers
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept, hooks = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage, tensor.dtype)
        return tensor

    def before(*_):
        hooks.append(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        hooks[-1].__enter__()

    for layer in layers:
        layer.gradient_checkpointing = False
    layer = layers[len(layers) // 2]
    handles = [
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(lambda *_: hooks.pop().__exit__(None, None, None)),
    ]
    with autocast:
        loss(batch)
    for handle in handles:
        handle.remove()
    total = {}
    for storage, dtype in kept.values():
        total[str(dtype).removeprefix("torch.")] = total.get(str(dtype).removeprefix("torch."), 0) + storage.nbytes()
    return total


def plan(config: dict, args, tokens: int, kept: int) -> tuple[int, float]:
    """(layers to checkpoint, GiB at the peak) on a 24 GB card under the 0.95 cap; facts as in the README."""
    import train_sft_dolores as trainer

    h, f, v, n = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    kv = config["num_key_value_heads"] * config["head_dim"]
    weights = n * (2 * h * h + 2 * h * kv + 3 * h * f)
    adapters = n * args.r * (2 * (h + h) + 2 * (h + kv) + 3 * (h + f))
    nf4 = weights / 2 + weights / 64 * (1 + 4 / 256)
    fixed = nf4 + 2 * 2 * v * h + adapters * (4 + 4 + 2)  # embedding and head; adapters, gradients, 8-bit moments
    head = min(trainer.chunk_rows(v), args.trained * tokens) * v * 12  # logits bf16 and float32, their gradients
    layer = kept + tokens * f * 8 + 2 * h * f * 2  # one layer recomputed, its backward's transients
    cap = CARD_GIB * 2**30 * FRACTION - MARGIN_GIB * 2**30

    def peak(k):
        return fixed + (n - k) * kept + k * tokens * h * 2 + max(head, layer)

    k = next((k for k in range(n + 1) if peak(k) <= cap), n)
    return k, peak(k) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=DOCUMENTS, help="lengths of a row's conversations")
    parser.add_argument("--trained", type=float, default=TRAINED, help="share of trained tokens")
    parser.add_argument("--r", type=int, default=32, help="LoRA rank")
    parser.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout")
    parser.add_argument("--layers", type=int, default=LLAMA_31_8B["num_hidden_layers"], help="decoder layers")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = LLAMA_31_8B | {"num_hidden_layers": args.layers}
    tokens = sum(args.documents)
    print(f"command   {shlex.join(['python', *sys.argv])}")
    import torch

    print(f"date      {datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    print(
        f"row       {tokens} tokens, documents of {args.documents}, {args.trained:.0%} trained; dropout {args.dropout}"
    )
    print(f"\n{'':36}GFLOP/token   of it attention   layer keeps KB/token   of it float32")

    def line(name, make, k, rows):
        flops, kept = {"attention": 0, "rest": 0}, {}
        for documents in rows:
            more, kept = count(make, config, args, k, documents)
            flops = {kind: flops[kind] + more[kind] for kind in flops}
        last = sum(rows[-1])
        total = sum(flops.values()) / tokens / 1e9
        print(
            f"{name:<36}{total:11.2f}{flops['attention'] / tokens / 1e9:18.2f}{sum(kept.values()) / last / 1e3:23.1f}"
            f"{kept.get('float32', 0) / last / 1e3:16.1f}",
            flush=True,
        )
        return total, sum(kept.values()), last

    alone = [[length] for length in args.documents]
    peers = [
        line(f"plain Trainer, {args.layers} of {args.layers} checkpointed", plain, args.layers, alone)[0],
        line(f"TRL 1.16, {args.layers} of {args.layers} checkpointed", trl, args.layers, [args.documents])[0],
    ]
    _, kept, _ = line(f"ours, all {args.layers} checkpointed", ours, args.layers, [args.documents])
    k, gib = plan(config, args, tokens, kept)
    best = line(f"ours, {k} of {args.layers} checkpointed (24 GB)", ours, k, [args.documents])[0]
    if k:
        line("ours, none checkpointed", ours, 0, [args.documents])
    print(
        f"\n24 GB plan: {k} of {args.layers} layers checkpointed, {gib:.1f} GiB at the peak [model], cap {CARD_GIB * FRACTION:.1f}"
    )
    print(f"peers spend {peers[0] / best:.2f} × (plain) and {peers[1] / best:.2f} × (TRL) of our products")


if __name__ == "__main__":
    main()
