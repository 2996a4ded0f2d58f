"""The check before training sees each part of our path when it is broken, and passes it when it is right."""

import contextlib
from functools import cache

import families
import numpy as np
import pytest
import torch
from runs import arguments, assert_says, error_of
from torch.nn.attention import varlen

import train_sft_dolores as sft

sft.load_libraries()
PRECISIONS = {"float32": ("--no-bf16", "--no-bnb-nf4"), "bfloat16 and NF4": ()}
CASES = [("llama3", "float32"), *((name, "bfloat16 and NF4") for name in families.TRAINABLE)]


class OneRow:
    """Rows of one packed row of random documents."""

    def __init__(self, vocabulary: int):
        self.ids = np.random.default_rng(0).integers(0, vocabulary, (8, 40), dtype=np.int32)

    def __getitem__(self, row: int) -> dict:
        return {"input_ids": list(self.ids)}


@cache
def loaded(name: str, precision: str):
    """(model, rows) of a family, as `load_model` gives them to the check."""
    args = arguments("--model", families.family(name), *PRECISIONS[precision])
    base = sft.find_base(args, args.model)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
    model = sft.add_lora(sft.load_base(args, base.folder, torch.device("cpu")), args, targets, None)
    model.forward = torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)(model.forward)
    return model, OneRow(base.config["vocab_size"])


# ---- Faults of our path: they spare the plain one ----


class Scaled(torch.autograd.Function):
    """The same value, and a gradient 1.1 times too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


@contextlib.contextmanager
def fault(name: str, model):
    """Break one thing in our path."""
    plain, plain_path, collate = [], sft.plain_path, sft.collate

    @contextlib.contextmanager
    def watched(decoder):
        plain.append(True)
        with plain_path(decoder):
            yield
        plain.clear()

    def scale_gradient(module, inputs):
        return None if plain else (Scaled.apply(inputs[0]), *inputs[1:])

    def scale_recomputed(module, inputs):
        in_backward = torch._C._current_graph_task_id() != -1
        return (1.1 * inputs[0], *inputs[1:]) if in_backward else None

    suffix, hook = {
        ATTENTION: (".o_proj", scale_gradient),
        WEIGHT: (".base_layer", scale_gradient),
        RECOMPUTED: (".base_layer", scale_recomputed),
    }.get(name, ("-", None))
    modules = model.get_base_model().get_decoder().layers.named_modules()
    handles = [module.register_forward_pre_hook(hook) for name, module in modules if name.endswith(suffix)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "plain_path", watched)
        if name in BATCHES:
            patch.setattr(sft, "collate", lambda rows: (batch := collate(rows)) | BATCHES[name](batch))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def without_borders(batch: dict) -> dict:
    return {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


def joined_by_a_mask(batch: dict) -> dict:
    return {"attention_mask": torch.ones_like(batch["input_ids"])}


def labels_of_the_same_token(batch: dict) -> dict:
    targets = batch["input_ids"][:, batch["logits_to_keep"]]
    return {"labels": targets, "shift_labels": targets}


def logits_of_the_next_token(batch: dict) -> dict:
    return {"logits_to_keep": batch["logits_to_keep"] + 1}


def one_document(batch: dict) -> dict:
    kept = batch["logits_to_keep"] < batch["cu_seq_lens_q"][1]
    targets = batch["labels"][:, kept]
    return {"logits_to_keep": batch["logits_to_keep"][kept], "labels": targets, "shift_labels": targets}


BATCHES = {
    "documents leak": without_borders,
    "documents leak through a mask": joined_by_a_mask,
    "labels of the same token": labels_of_the_same_token,
    "logits of the next token": logits_of_the_next_token,
    "only one document is trained": one_document,
}
ATTENTION, WEIGHT = "the attention's gradient x 1.1", "W x 1.1 in backward"
RECOMPUTED = "recomputed activations x 1.1"
FAULTS = (*BATCHES, ATTENTION, WEIGHT, RECOMPUTED)


@pytest.mark.parametrize("name, precision", CASES)
def test_each_fault_is_seen(name, precision):
    model, rows = loaded(name, precision)
    seen = {}
    for broken in FAULTS:
        with fault(broken, model):
            seen[broken] = sft.differences(model, rows)
    print(f"{name}, {precision}:", ", ".join(f"{broken} {max(apart):.1%}" for broken, apart in seen.items()))
    assert min(max(apart) for apart in seen.values()) > 1.25 * sft.TOLERANCE


@pytest.mark.parametrize("name, precision", CASES)
def test_the_right_path_passes_and_nothing_stays_changed(name, precision, capsys):
    model, rows = loaded(name, precision)
    layers, before = model.get_base_model().get_decoder().layers, {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    with fault("none", model):
        loss, gradients = sft.differences(model, rows)
    assert loss < 0.001 and gradients < (0.04 if precision != "float32" else 1e-4), (loss, gradients)
    sft.check_packing(model, rows)
    assert capsys.readouterr().out.count("\n") <= 2
    assert torch.equal(torch.get_rng_state(), random)
    assert model.get_base_model().get_decoder().layers is layers
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_broken_path_ends_in_one_line():
    model, rows = loaded("llama3", "float32")
    with fault("documents leak", model):
        assert_says(error_of(sft.check_packing, model, rows), "--model", "CPU")


# ---- varlen_attn: sdpa by document stands in for the kernel, which needs CUDA ----


def by_document(
    q, k, v, ends, ends_k, longest, longest_k, *, scale, window_size, enable_gqa, borders=True, causal=True
):
    """q [T, heads, d], k and v [T, kv_heads, d] -> [T, heads, d], as torch's documentation of varlen_attn says."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and ends.dtype == torch.int32 and enable_gqa
    assert longest == int(ends.diff().max()) and ends[-1] == len(q)
    place = torch.arange(len(q))
    behind = place[:, None] - place
    left, right = window_size
    seen = (behind <= left) | (left < 0)
    seen &= (-behind <= right) if causal else True
    if borders:
        document = torch.searchsorted(ends, place, right=True)
        seen &= document[:, None] == document
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


KERNELS = {
    "right": by_document,
    "documents leak": lambda *args, **kwargs: by_document(*args, borders=False, **kwargs),
    "the future leaks": lambda *args, **kwargs: by_document(*args, causal=False, **kwargs),
    "no scale": lambda *args, **kwargs: by_document(*args, **kwargs | {"scale": 1.0}),
    "no window": lambda *args, **kwargs: by_document(*args, **kwargs | {"window_size": (-1, 0)}),
    "raises": lambda *args, **kwargs: torch.zeros(1) @ torch.zeros(2),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama3", "qwen3", "mistral", "gemma3", "phi3"])
def test_sdpa_takes_the_place_of_a_wrong_kernel(name, kernel, monkeypatch, capsys):
    monkeypatch.setattr(varlen, "varlen_attn", KERNELS[kernel])
    model, rows = loaded(name, "bfloat16 and NF4")
    config = model.get_base_model().config
    if kernel == "no window" and not getattr(config, "sliding_window", None):
        pytest.skip("no window in this family")
    config._attn_implementation = sft.choose_attention(families.family(name), torch.device("cuda"), bf16=True)
    sft.check_packing(model, rows)
    assert config._attn_implementation == ("packed" if kernel == "right" else "sdpa"), capsys.readouterr().out
    if kernel != "right":
        assert "varlen_attn" in capsys.readouterr().out
    config._attn_implementation = "sdpa"
