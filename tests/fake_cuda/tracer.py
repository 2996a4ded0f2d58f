#!/usr/bin/env python3
# ruff: noqa: E402 - the device must be there before torch is imported
"""Trace the trainer's CUDA path on fake CUDA tensors: every shape, dtype and device check of torch, no GPU, no weights.

    echo '{"tokens": 4096, "checkpointing": "none"}' | python tests/fake_cuda/tracer.py

Each input line is one job, as JSON: fields of `Case`, and `job` where it is another than `step`. Each printed line is
what it found, as JSON. One process does all jobs, because imports take longer than most of them.

A trace counts what PyTorch's allocator would hand out: the bytes of all storages on the card that are alive, their
peak, and the buffers that kernels take for themselves (`WORKSPACE`). It cannot show time, values, fragmentation, or
what the driver keeps for itself. Where autograd adds up gradients, it makes a new tensor of each sum, as it does for
fake tensors only: a peak may be too high by one of 2 h bytes a token.
"""

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load_guard() -> None:
    """Compile guard.cpp for the installed torch, once per machine, and load it; torch must not be imported yet."""
    assert "torch" not in sys.modules, "import this module before torch"
    if shutil.which("g++") is None:
        sys.exit("g++ is missing: it compiles guard.cpp")
    import parts

    torch_folder, source = Path(find_spec("torch").origin).parent, HERE / "guard.cpp"
    version = (torch_folder / "version.py").read_bytes()
    key = hashlib.sha256(source.read_bytes() + version + str(torch_folder).encode()).hexdigest()[:16]

    def compile_into(folder: Path) -> None:
        library, lib = folder / "guard.so", torch_folder / "lib"
        command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include", source, f"-L{lib}",
                   "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}", "-o", library]  # fmt: skip
        subprocess.run(list(map(str, command)), check=True)

    folder = parts.made_once(parts.CACHE / f"fake_cuda_{key}", compile_into)
    ctypes.CDLL(str(folder / "guard.so"), mode=ctypes.RTLD_GLOBAL)


load_guard()

import bitsandbytes as bnb
import numpy as np
import torch
import torch.nn.attention.varlen  # it registers the operators named below
from bitsandbytes.functional import QuantState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import train_sft_dolores as sft

GIB = 2**30
LLAMA31_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a training step; the defaults are the documented run's."""

    tokens: int = 2048  # of a row
    rows: int = 1
    documents: int = 5  # of a row, of equal length
    trained: float = 0.68  # share of each document's tokens
    checkpointing: str | int = "all"
    nf4: bool = True
    dropout: float = 0.05
    r: int = 32
    layers: int = 32
    card: float = 24  # GiB

    def args(self):
        """The trainer's settings for this case."""
        values = {"max-length": self.tokens, "train-batch-size": self.rows, "lora-r": self.r, "lora-dropout": self.dropout,
                  "gradient-checkpointing": self.checkpointing if isinstance(self.checkpointing, str) else "all"}  # fmt: skip
        switch = "--bnb-nf4" if self.nf4 else "--no-bnb-nf4"
        return sft.parse_args([switch, *(text for name, value in values.items() for text in (f"--{name}", str(value)))])

    def lengths(self) -> list[int]:
        length = self.tokens // self.documents
        return [length] * (self.documents - 1) + [self.tokens - length * (self.documents - 1)]

    def row(self) -> dict:
        """One packed row as the trainer's data side yields it."""
        ids = [np.arange(n, dtype=np.int32) for n in self.lengths()]
        labels = [np.where(np.arange(len(x)) < round(len(x) * (1 - self.trained)), sft.IGNORE, x) for x in ids]
        return {"input_ids": ids, "labels": labels, "file": ["data"] * len(ids), "line": list(range(len(ids)))}

    def plan(self, folder: str):
        """The trainer's plan, with what it asks of rows."""
        rows = mock.MagicMock(**{"longest.return_value": self.row(), "__getitem__.return_value": self.row()})
        base = sft.Base(folder, None, LLAMA31_8B | {"num_hidden_layers": self.layers}, None)
        counts = {"tokens": 100, "trained_tokens": round(100 * self.trained)}
        return sft.Plan(self.args(), sft.World(), {}, counts, [], None, base, rows)


# ---- What a card would do that fake tensors do not ------------------------------------------------


def nf4_matmul_workspace(x, data, shape, *args, **kwargs) -> int:
    """bitsandbytes restores the weight to 16 bits and its scales to float32 twice, then multiplies (above 512 rows)."""
    outs, ins = shape
    return outs * ins * x.itemsize + 2 * outs * ins // 64 * 4 if x.numel() // ins > 512 else 0


def attention_backward_workspace(grad, query, key, value, out, lse, ends, *args, **kwargs) -> int:
    """FlashAttention 2 sums dq in float32, padded by 128 rows a document, and has dk and dv for every query head."""
    tokens, heads, width = query.shape
    padded = tokens + 128 * (ends.numel() - 1)
    expanded = 2 * tokens * heads * width * query.itemsize if key.shape[1] != heads else 0
    return padded * heads * (width + 1) * 4 + expanded


CONTEXT = 0.7  # GiB that the driver takes for a process; a guess, no card has been asked
GEMM_4BIT, VARLEN = torch.ops.bitsandbytes.gemm_4bit, torch.ops.torch_attn._varlen_attn
VARLEN_BACKWARD = torch.ops.torch_attn._varlen_attn_backward
WORKSPACE: dict[object, Callable[..., int]] = {
    GEMM_4BIT.default: nf4_matmul_workspace,
    VARLEN_BACKWARD.default: attention_backward_workspace,
}
# Kernels that one operator starts, where it is not one; from the operators' sources.
KERNELS = {"bitsandbytes::gemm_4bit": 4, "torch_attn::_varlen_attn": 2, "torch_attn::_varlen_attn_backward": 5}
NO_KERNEL = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view",
             "aten::lift_fresh", "aten::_local_scalar_dense", "prim::device"}  # fmt: skip


class Trace(TorchDispatchMode):
    """Count the bytes alive on the card, their peak, the operators, and the values that the CPU waits for."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.waits = self.kernels = 0
        self.limit = float("inf")  # bytes; more of them are out of memory
        self.operators: Counter[str] = Counter()
        self.scalar: Callable[[], float] = float  # what the CPU reads whenever it asks the card for a value
        self._known: weakref.WeakSet = weakref.WeakSet()

    def start(self) -> None:
        """Forget the peak and the counts, keep what is alive."""
        gc.collect()
        self.peak, self.waits, self.kernels = self.live, 0, 0
        self.operators.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a question of autograd's, not an operator
            return args[0].fake_device
        self._count(func, args)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.waits += 1
            return self.scalar()
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._add(tensor.untyped_storage())
        needed = self.live + (WORKSPACE[func](*args, **kwargs) if func in WORKSPACE else 0)
        if needed > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.peak = max(self.peak, needed)
        return result

    def _add(self, storage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            size = -(-storage.nbytes() // 512) * 512  # the allocator's unit
            self.live += size
            weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size

    def _count(self, func, args) -> None:
        name = func.name().split(".")[0]
        self.operators[name] += 1
        on_card = any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in tree_iter(args))
        if on_card and not func.is_view and name not in NO_KERNEL:
            lists = -(-len(args[0]) // 64) if name.startswith("aten::_foreach_") else 1  # so many tensors at a time
            self.kernels += KERNELS.get(name, lists)


def declare_kernels() -> None:
    """Tell the dispatcher of the CUDA kernels that this torch build lacks.

    An operator that has both a formula for any device and a kernel of its own is taken apart where the kernel is
    missing: SiLU's backward would make five tensors in place of one. Fake tensors never run the kernel.
    """

    def has_kernel(name: str, key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)

    def kernel(*args):
        raise AssertionError("a kernel ran on a fake tensor")

    names = ["aten::_fused_rms_norm"]  # it has no kernel for CPUs
    for name in torch._C._dispatch_get_all_op_names():
        formula = name.startswith("aten::") and has_kernel(name, "CompositeImplicitAutograd")
        if formula and has_kernel(name, "CPU") and not has_kernel(name, "CUDA"):
            names.append(name)
    for name in names:
        CUDA_KERNELS.impl(name.removeprefix("aten::"), kernel, "CUDA")


CUDA_KERNELS = torch.library.Library("aten", "IMPL")  # the declarations last as long as this


class Card:
    """A fake card: its fake tensors (`mode`) and what is counted on them (`trace`)."""

    def __init__(self):
        self.mode, self.trace = FakeTensorMode(allow_non_fake_inputs=True), Trace()
        declare_kernels()

    @contextlib.contextmanager
    def on(self, gib: float = 24):
        """Fake tensors, and torch.cuda's answers for a card of this size."""
        trace, total = self.trace, round(gib * GIB)
        answers = {
            "empty_cache": gc.collect,
            "reset_peak_memory_stats": trace.start,
            "max_memory_reserved": lambda: trace.peak,
            "memory_reserved": lambda: trace.live,
            "mem_get_info": lambda device: (total - round(CONTEXT * GIB) - trace.live, total),
            "is_bf16_supported": lambda: True,  # autocast asks
        }
        with contextlib.ExitStack() as stack:
            for name, function in answers.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, function))
            available = mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            for context in (available, self.mode, trace):
                stack.enter_context(context)
            yield

    def put(self, batch: dict) -> dict:
        """The batch's tensors on the card; the copies are counted."""
        with self.mode:
            fake = {name: self.mode.from_tensor(x) if torch.is_tensor(x) else x for name, x in batch.items()}
        with self.on():
            return {name: x.to("cuda") if torch.is_tensor(x) else x for name, x in fake.items()}


# ---- The model ---------------------------------------------------------------------------------------


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer, double quantised NF4; made by hand, for its Params4bit cannot wrap a fake tensor."""

    def __init__(self, ins: int, outs: int):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = ins, outs, None
        self.compute_dtype, self.compute_type_is_set, self.quant_storage = torch.bfloat16, True, torch.uint8
        self.support_avx512bf16_for_cpu = False
        blocks = outs * ins // 64
        scales = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        self.quant_state = QuantState(
            torch.empty(blocks, dtype=torch.uint8), shape=torch.Size((outs, ins)), code=torch.empty(16), blocksize=64,
            quant_type="nf4", dtype=torch.bfloat16, offset=torch.empty(()), state2=scales,
        )  # fmt: skip
        self.weight = torch.nn.Parameter(torch.empty(outs * ins // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state, self.weight.quant_type = self.quant_state, "nf4"
        self.weight.compress_statistics = True


def load_base(args, folder: str, device: torch.device):
    """The trainer's `load_base` without numbers."""
    config, attention = LlamaConfig.from_pretrained(folder), sft.choose_attention(folder, device, args.bf16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
        for parent in list(model.modules()) if args.bnb_nf4 else []:
            for name, linear in list(parent.named_children()):
                if name in PROJECTIONS:
                    setattr(parent, name, Linear4bit(linear.in_features, linear.out_features))
    model.is_loaded_in_4bit = args.bnb_nf4  # PEFT asks
    model.config.use_cache = False
    return model.requires_grad_(False)


def load(card: Card, case: Case):
    """(model, what was printed): by the trainer's own `load_model`, with its self-check and its choice of layers."""
    # PEFT moves new adapters to the base's device; Module.to would replace fake parameters, and they are there.
    stay = mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
    base, seed = mock.patch.object(sft, "load_base", load_base), mock.patch.object(sft.transformers, "set_seed")
    add_lora, printed = sft.add_lora, io.StringIO()

    def add_on_card(*args):
        with torch.device("cuda"):
            return add_lora(*args)

    lora = mock.patch.object(sft, "add_lora", add_on_card)
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**LLAMA31_8B | {"num_hidden_layers": case.layers}).save_pretrained(folder)
        with card.on(case.card), stay, base, lora, seed, contextlib.redirect_stdout(printed):
            model = sft.load_model(case.plan(folder), PROJECTIONS, torch.device("cuda", 0))
    gc.collect()
    return model, printed.getvalue()


def choose_layers(card: Card, model, case: Case) -> int:
    """How many layers the trainer spares from recomputing."""
    with card.on(case.card), contextlib.redirect_stdout(io.StringIO()):
        sft.choose_checkpointing(model, case.plan("").train_rows, case.args())
    if isinstance(case.checkpointing, int):
        sft.checkpoint_layers(model.get_base_model().get_decoder().layers, case.layers - case.checkpointing)
    return sum(not layer.gradient_checkpointing for layer in model.get_base_model().get_decoder().layers)


# ---- What is traced ----------------------------------------------------------------------------------


def step(card: Card, model, case: Case) -> dict:
    """The second of two micro-steps, when all gradients exist: bytes, FLOPs, operators, kernels."""
    spared = choose_layers(card, model, case)
    batch = card.put({k: v for k, v in sft.collate([case.row()] * case.rows).items() if k != "documents"})
    sums = Counter()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p, name=name: sums.update([name])) for name, p in trained]
    counter = FlopCounterMode(display=False, custom_mapping=formulas(case))
    with card.on(case.card):
        micro_step(model, batch)
        card.trace.start()
        micro_step(model, batch)
        found = {"spared": spared, "peak": card.trace.peak, "operators": sum(card.trace.operators.values()),
                 "kernels": card.trace.kernels, "waits": card.trace.waits}  # fmt: skip
        with counter:
            micro_step(model, batch)
    for hook in hooks:
        hook.remove()
    assert all(count == 3 for count in sums.values()), sums
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (name in sums), name
    assert {(p.dtype, p.grad.dtype, p.grad.device.type) for _, p in trained} == {(torch.float32,) * 2 + ("cuda",)}
    model.zero_grad()
    plan = sft.memory_plan(case.plan(""))
    return found | {"gflop": counter.get_total_flops() / case.tokens / case.rows / 1e9, "planned": plan}


def micro_step(model, batch: dict) -> None:
    """Forward and backward of one batch, as Trainer does them."""
    loss = model.train()(**batch, num_items_in_batch=1000).loss
    assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
    loss.backward()


def formulas(case: Case) -> dict:
    """FLOPs of the operators that torch does not know: NF4 products, and attention within documents."""
    pairs = case.rows * sum(n * (n + 1) // 2 for n in case.lengths())  # each token and those before it

    def gemm_4bit(x, data, shape, *args, **kwargs) -> int:
        return 2 * int(np.prod(x[:-1])) * int(np.prod(shape))

    def forward(query, *args, **kwargs) -> int:
        return 2 * 2 * pairs * query[1] * query[2]  # Q K^T and P V

    def backward(grad, query, *args, **kwargs) -> int:
        return 5 * 2 * pairs * query[1] * query[2]  # Q K^T again, and four for the gradients

    return {GEMM_4BIT: gemm_4bit, VARLEN: forward, VARLEN_BACKWARD: backward}


def loading(card: Card, model, case: Case) -> dict:
    """`load_model` once more, with the self-check's own peak, operators and waits."""
    checked, check_path = {}, sft.check_packing

    def watched(*args) -> None:
        card.trace.start()
        before = card.trace.live
        check_path(*args)
        checked.update(peak=card.trace.peak - before, operators=dict(card.trace.operators), waits=card.trace.waits)
        gc.collect()
        checked["left"] = card.trace.live - before

    with mock.patch.object(sft, "check_packing", watched):
        model, printed = load(card, case)
    return {"printed": printed, "attention": model.get_base_model().config._attn_implementation, "checked": checked}


def measured(card: Card, model, case: Case) -> dict:
    """What the trainer chooses after measuring on this card, where more than its memory is out of memory; and the
    peaks of that step, and of one with an eighth more layers."""
    gc.collect()
    before = card.trace.live
    card.trace.limit = round((case.card - CONTEXT) * GIB)
    try:
        spared = choose_layers(card, model, dataclasses.replace(case, checkpointing="auto"))
    finally:
        card.trace.limit = float("inf")
    gc.collect()
    left, steps = card.trace.live - before, []
    for layers in (spared, min(case.layers, spared + case.layers // 8)):
        steps.append(step(card, model, dataclasses.replace(case, checkpointing=case.layers - layers)))
    return {"spared": spared, "left": left, "peak": steps[0]["peak"], "next": steps[1]["peak"]}


def evaluation(card: Card, model, case: Case) -> dict:
    """The held-out loss of a batch, without gradients."""
    batch = card.put({k: v for k, v in sft.collate([case.row()] * case.rows).items() if k != "documents"})
    with card.on(), torch.no_grad():
        card.trace.start()
        before = card.trace.live
        loss = model.eval()(**batch, num_items_in_batch=1).loss
        assert loss.shape == () and loss.dtype == torch.float32 and not loss.requires_grad
        left = card.trace.live - before
    return {"peak": card.trace.peak, "left": left, "waits": card.trace.waits}


def generation(card: Card, model, case: Case, tokens: int) -> dict:
    """A greedy answer of so many tokens through the trainer's own function, with the key-value cache."""
    tokenizer = mock.Mock(eos_token_id=128009, bos_token_id=128000)
    tokenizer.decode = lambda ids, **_: f" {len(ids)} "  # fake ids have no values
    with card.on():
        card.trace.start()
        chosen = card.trace.operators
        card.trace.scalar = lambda: float(chosen["aten::argmax"] >= tokens)  # "is the answer finished?"
        answers = sft.generate_answers(model, tokenizer, {"Qui es-tu ?": [128000, 15546, 1560]}, tokens)
        card.trace.scalar = float
    return {"tokens": answers, "operators": dict(card.trace.operators)}


JOBS = {job.__name__: job for job in (step, loading, measured, evaluation, generation)}


def main() -> None:
    """Do the jobs that standard input names, one JSON object a line: `job`, `options`, and the fields of `Case`."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sft.load_libraries()
    torch.cuda.default_generators = (torch.Generator(),)  # the card's
    card, made, model = Card(), None, None
    for line in sys.stdin:
        fields = json.loads(line)
        job, options = JOBS[fields.pop("job", "step")], fields.pop("options", {})
        case = Case(**fields)
        build = case.nf4, case.dropout, case.r, case.layers
        try:
            if build != made:
                model = None
                (model, _), made = load(card, dataclasses.replace(case, checkpointing="all")), build
            result = job(card, model, case, **options)
        except Exception:
            result, made = {"error": traceback.format_exc()}, None
        print(json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)  # at a normal exit, autograd's threads for the fake card sometimes abort the process


if __name__ == "__main__":
    main()
