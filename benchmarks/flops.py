#!/usr/bin/env python3
"""FLOPs of a token and bytes kept for backward, counted on the meta device: no GPU, no weights, the same every time.

    python benchmarks/flops.py                          # Llama-3.1-8B, LoRA r=32 on all projections, rows of 2,048
    python benchmarks/flops.py --layers 2 --hidden 256 --intermediate 512 --length 256

torch's FlopCounterMode counts the matrix products of one forward and backward over one packed row, recomputation
included; saved_tensors_hooks sum what autograd keeps. The layers are bitsandbytes' own Linear4bit, the row is one of
train.chatml's, the number of free layers is what the trainer's memory_plan leaves on a 24 GiB card.
"""

import argparse
import warnings
from functools import partial

import llama
import numpy as np

import train_sft_dolores as sft

PLAIN, TRL = "plain Trainer", "TRL 1.16"
CPU_TOKENS = 128  # the peers' layer is run for real on so many


def typical_row(length: int) -> tuple[dict, float, int]:
    """Of train.chatml packed by the trainer: the full row nearest to the mean in attention work and trained share.

    Returns (row, the corpus's share of trained tokens, its rows).
    """
    import parts

    args = sft.parse_args(["--model", str(parts.llama31_tokenizer()), "--max-length", str(length), "--eval-fraction", "0",
                           "--train-files", str(llama.ROOT / "train.chatml")])  # fmt: skip
    encode = sft.load_encoder(args.model, args.model, args.chat_format)
    rows, _, _, counts, _ = sft.prepare_data(args, sft.World(), sft.find_files(args.train_files), {}, encode)
    rows = [rows[i] for i in range(len(rows))]
    tokens = np.array([sum(map(len, row["input_ids"])) for row in rows])
    pairs = np.array([sum(len(ids) ** 2 for ids in row["input_ids"]) for row in rows])
    trained = np.array([sum((labels != sft.IGNORE).sum() for labels in row["labels"]) for row in rows])
    off = abs(pairs / pairs.mean() - 1) + abs(trained / trained.mean() - 1) + (tokens < 0.99 * length)
    return rows[off.argmin()], counts["trained_tokens"] / counts["tokens"], len(rows)


def attention_on_meta(lengths: list[int]) -> dict:
    """Register what CUDA would run, for on meta torch takes the plain formula; returns what FLOPs they and NF4 do.

    Ours is the CUDA branch of the trainer's packed attention (`is_cuda` is false on meta). With a mask,
    as the peers have one, scaled_dot_product_attention takes the memory-efficient kernel: it does all S x S work.
    """
    import bitsandbytes  # noqa: F401 - it makes the operators counted below
    import torch
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv

    def packed(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        ends, longest = (cu_seq_lens_q,) * 2, (max_length_q,) * 2
        out = varlen_attn(q, k, v, *ends, *longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        return out[None], None

    def sdpa(module, query, key, value, mask, scaling=None, **kwargs):
        key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        bias = torch.zeros_like(mask, dtype=query.dtype).expand(-1, query.shape[1], -1, -1)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, True, scale=scaling)[0].transpose(1, 2), None

    AttentionInterface.register("packed_on_cuda", packed)
    AttentionInterface.register("sdpa_on_cuda", sdpa)
    pairs = sum(n * (n + 1) // 2 for n in lengths)  # each token and those before it in its document

    def forward(query, *args, **kwargs):
        return 2 * 2 * pairs * query[1] * query[2]  # Q K^T and P V

    def backward(grad, query, *args, **kwargs):
        return 5 * 2 * pairs * query[1] * query[2]  # Q K^T again, and four for the gradients

    def gemm_4bit(x, data, shape, *args, **kwargs):
        return 2 * int(np.prod(x[:-1])) * int(np.prod(shape))

    def addmm_(total, a, b, *args, **kwargs):
        return 2 * a[0] * a[1] * b[1]

    ops = torch.ops
    return {ops.aten.addmm_: addmm_, ops.torch_attn._varlen_attn: forward, ops.torch_attn._varlen_attn_backward: backward,
            ops.bitsandbytes.gemm_4bit: gemm_4bit}  # fmt: skip


def drop_as_on_cuda(model) -> None:
    """The peers' dropout keeps a mask of one byte a number on CUDA; the one for other devices keeps it in x's dtype."""
    import torch

    class Dropout(torch.nn.Dropout):
        def forward(self, x):
            return torch.native_dropout(x, self.p, self.training)[0]

    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.__class__ = Dropout


def our_step(shape: dict, args, batch: dict, free: int):
    """(base model, a function that returns the loss): a step the trainer's way, `free` layers not checkpointed."""
    import torch

    model = llama.nf4_llama(shape, "meta", "packed_on_cuda")
    # Head and SiLU as functions: FlopCounterMode's hooks on modules fail where autograd.grad is called inside a step.
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = torch.nn.functional.silu
    model.get_output_embeddings = lambda: partial(torch.nn.functional.linear, weight=model.lm_head.weight)
    sft.install_chunked_loss(model)
    model = sft.add_lora(model, args, args.lora_target_modules, None)
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    sft.checkpoint_layers(base.get_decoder().layers, free)
    inputs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items() if k != "documents"}
    return base, lambda: model.train()(**inputs).loss


def peer_step(shape: dict, args, batch: dict, which: str, device="meta", free=0):
    """The same for the peers, who checkpoint all layers. The mask is given, for building it reads values."""
    import peft
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    model = llama.nf4_llama(shape, device, "sdpa_on_cuda" if device == "meta" else "sdpa")
    if which == PLAIN:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    sft.checkpoint_layers(model.model.layers, free)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=args.lora_r, lora_alpha=args.lora_alpha,
                             lora_dropout=args.lora_dropout, target_modules=args.lora_target_modules)  # fmt: skip
    model = peft.get_peft_model(model, config).train()
    drop_as_on_cuda(model)
    base, length = model.get_base_model(), batch["input_ids"].shape[1]
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    inputs |= {"attention_mask": mask, "use_cache": False}
    if which == PLAIN:
        labels = torch.zeros(1, length, dtype=torch.long, device=device)
        return base, lambda: model(**inputs, labels=labels).loss
    for value in model.parameters():  # SFTTrainer does so where the base is quantised
        if value.requires_grad:
            value.data = value.data.to(torch.bfloat16)
    keep, targets = batch["logits_to_keep"].to(device), batch["shift_labels"][0].to(device)

    def loss():
        """On CUDA SFTTrainer's fused head sees trained tokens only; backward computes their logits once more."""
        hidden = base.model(**inputs).last_hidden_state[0].index_select(0, keep)
        return checkpoint(lambda hidden: cross_entropy(base.lm_head(hidden), targets), hidden, use_reentrant=False)

    return base, loss


def flops(step, formulas: dict) -> int:
    """FLOPs of one forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step().backward()
    return counter.get_total_flops()


def kept(base, step) -> int:
    """Bytes that autograd keeps of one forward: each storage once, parameters not."""
    import torch

    storages = {value.untyped_storage()._cdata: 0 for value in [*base.parameters(), *base.buffers()]}
    alive = []  # a storage that has gone could lend its address to the next

    def pack(tensor):
        alive.append(tensor)
        if tensor.device == base.device:  # the state of a generator is not
            storages.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(storages.values())


def kept_by_layer(make, tokens: int) -> tuple[float, float]:
    """(checkpointed, free): bytes per token that one layer keeps; make(layers, free) -> (base, step)."""
    none, one, two = (kept(*make(layers, free)) for layers, free in ((1, 0), (2, 0), (2, 1)))
    return (one - none) / tokens, (two - none) / tokens


def peer_on_cpu(shape: dict, args, batch: dict, which: str):
    """make() for kept_by_layer with real numbers, for autocast does not know the meta device.

    What a layer keeps for a token depends neither on the vocabulary nor, but for the mask, on the row's length.
    """
    import torch

    ids, keep = batch["input_ids"][:, :CPU_TOKENS] % 1000, torch.arange(CPU_TOKENS // 2)
    small = {"input_ids": ids, "position_ids": torch.arange(CPU_TOKENS)[None], "logits_to_keep": keep,
             "shift_labels": ids[:, : CPU_TOKENS // 2]}  # fmt: skip

    def make(layers, free):
        base, step = peer_step(
            shape | {"num_hidden_layers": layers, "vocab_size": 1000}, args, small, which, "cpu", free
        )

        def under_autocast():
            torch.set_autocast_enabled("cuda", True)  # PEFT asks for CUDA's, whatever the device
            try:
                with torch.autocast("cpu", torch.bfloat16):
                    return step()
            finally:
                torch.set_autocast_enabled("cuda", False)

        return base, under_autocast

    return make


def fitting(shape: dict, args, tokens: int, share: float, card: float) -> tuple[int, float, float]:
    """(free layers, GiB then needed, bytes per token and free layer) by the trainer's memory_plan for this card."""
    layers = shape["num_hidden_layers"]
    need = [sum(sft.memory_plan(args, sft.World(), shape, tokens, share, free).values()) for free in range(layers + 1)]
    limit = 0.95 * args.torch_memory_fraction * card  # measure_room keeps the same margin
    free = max((free for free in range(layers + 1) if need[free] <= limit), default=0)
    return free, need[free], (need[-1] - need[1]) / max(1, layers - 1) * 2**30 / tokens


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    keys = {"layers": "num_hidden_layers", "hidden": "hidden_size", "intermediate": "intermediate_size"}
    for name, key in keys.items():
        parser.add_argument(f"--{name}", type=int, default=llama.LLAMA31_8B[key], help=f"the model's {key}")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--card", type=float, default=24, help="GiB of the card")
    options = parser.parse_args()
    shape = llama.LLAMA31_8B | {key: getattr(options, name) for name, key in keys.items()}
    shape["num_attention_heads"] = options.hidden // shape["head_dim"]
    shape["num_key_value_heads"] = max(1, shape["num_attention_heads"] // 4)
    sft.load_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)
    row, share, rows = typical_row(options.length)
    batch = sft.collate([row])
    lengths, tokens, layers = [len(ids) for ids in row["input_ids"]], batch["input_ids"].numel(), options.layers
    formulas = attention_on_meta(lengths)
    print(f"versions  {llama.versions('torch', 'transformers', 'peft', 'bitsandbytes')}")
    print(f"row       {tokens:,} tokens in documents of {', '.join(map(str, lengths))}; "
          f"{batch['labels'].numel() / tokens:.0%} trained (all {rows} rows of train.chatml: {share:.0%})")  # fmt: skip
    print(f"\n{'':<44}{'GFLOP':>7}{'layers':>14}{'kB/token kept by a layer':>27}")
    print(f"{'LoRA r=32 on all projections, NF4':<44}{'/token':>7}{'checkpointed':>14}{'checkpointed':>14}{'free':>8}")

    def report(name: str, step, free: int, sizes: tuple[float, float]):
        count = flops(step, formulas) / tokens / 1e9
        print(f"{name:<44}{count:>7.2f}{layers - free:>8} of {layers:<3}"
              f"{sizes[0] / 1e3:>13.1f}{sizes[1] / 1e3:>8.1f}", flush=True)  # fmt: skip

    for which in (PLAIN, TRL):
        args = sft.parse_args([])
        sizes = kept_by_layer(peer_on_cpu(shape, args, batch, which), CPU_TOKENS)
        report(which, peer_step(shape, args, batch, which)[1], 0, sizes)
    for dropout in (0.05, 0):
        args = sft.parse_args(["--lora-dropout", str(dropout), "--max-length", str(options.length)])

        def make(layers, free, args=args):
            return our_step(shape | {"num_hidden_layers": layers}, args, batch, free)

        free, need, each = fitting(shape, args, tokens, share, options.card)
        sizes = kept_by_layer(make, tokens)
        plans = {f"as many as {need:.1f} GiB allow": free}
        if dropout:
            plans = {"all checkpointed": 0, **plans, "none checkpointed": layers}
        for plan, free in plans.items():
            report(f"ours, dropout {dropout:g}, {plan}", make(layers, free)[1], free, sizes)
        print(f"  the memory plan counts {sizes[0] / 1e3 + each / 1e3:.1f} kB for a free layer")


if __name__ == "__main__":
    main()
