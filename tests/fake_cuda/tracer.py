#!/usr/bin/env python3
# ruff: noqa: E402 - the device must be there before torch is imported
"""Trace the trainer's CUDA path on fake CUDA tensors: every shape, dtype and device check of torch, no GPU, no weights.

    echo '{"tokens": 4096, "checkpointing": "none"}' | python tests/fake_cuda/tracer.py

Each input line is one job, as JSON: fields of `Case`, and `job` where it is another than `step`. Each printed line is
what it found, as JSON. One process does all jobs, because imports take longer than most of them.

A trace counts what PyTorch's allocator would hand out: the bytes of all storages on the card that are alive, their
peak, and the buffers that kernels take for themselves (`WORKSPACE`). It cannot show time, values, fragmentation, or
what the driver keeps for itself.
"""

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
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
        library = folder / "guard.so"
        command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include", str(source)]
        command += [
            f"-L{torch_folder}/lib",
            "-lc10",
            "-ltorch_cpu",
            f"-Wl,-rpath,{torch_folder}/lib",
            "-o",
            str(library),
        ]
        subprocess.run(command, check=True)

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
from transformers import AutoModelForCausalLM, LlamaConfig

import train_sft_dolores as sft

aten = torch.ops.aten
GIB = 2**30

LLAMA31_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a training step; the defaults are the documented run's."""

    tokens: int = 2048  # of a row
    rows: int = 1
    documents: int = 5  # of a row, of equal length
    trained: float = 0.68  # share of each document's tokens
    checkpointing: str | int = "all"
    nf4: bool = True
    bf16: bool = True
    dropout: float = 0.05
    r: int = 32
    layers: int = 32


# ---- The trainer: all that is used of it -----------------------------------------------------------

sft.load_libraries()

WORLD = sft.World(0, 1)
torch.cuda.default_generators = (torch.Generator(),)  # the card's


def flags_of(case: Case, *more: str):
    """The trainer's settings for this case."""
    switches = ["--bnb-nf4" if case.nf4 else "--no-bnb-nf4", "--bf16" if case.bf16 else "--no-bf16"]
    return sft.parse_args(
        ["--max-length", str(case.tokens), "--train-batch-size", str(case.rows), "--lora-r", str(case.r),
         "--lora-dropout", str(case.dropout), "--gradient-checkpointing", str(case.checkpointing), *switches, *more]
    )  # fmt: skip


def attention_name() -> str:
    return sft.packed_attention()


def install_loss(model) -> None:
    sft.install_chunked_loss(model)


def add_adapters(model, case: Case):
    args = flags_of(case)
    with (
        # Fake tensors have no values to compare.
        mock.patch.object(sft, "same_results", lambda *_: True),
        # PEFT moves new adapters to the base's device; Module.to would replace fake parameters, and they are there.
        mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module),
    ):
        model = sft.add_lora(model, args, args.lora_target_modules, None)
    for parameter in trained_of(model):
        parameter.register_post_accumulate_grad_hook(count_sum)
    forget_gradients(model)
    return model


def choose_checkpointing(model, case: Case) -> tuple[int, int]:
    """Let the trainer plan: (layers that keep their activations, rows run at once)."""
    with contextlib.redirect_stdout(sys.stderr):
        chosen = sft.plan_micro_steps(model, LongestRow(case), flags_of(case))
    return sum(not layer.gradient_checkpointing for layer in layers_of(model)), chosen.rows


def compile_layers(model, backend: str) -> None:
    sft.compile_layers(model.get_base_model(), backend=backend)


def collate(rows: list[dict]) -> dict:
    batch = sft.collate(rows)
    del batch["documents"]
    return batch


def planned(case: Case, free: int) -> dict[str, float]:
    """GiB of each part, by the trainer's memory plan."""
    shape = LLAMA31_8B | {"num_hidden_layers": case.layers}
    return sft.memory_plan(flags_of(case), WORLD, shape, case.tokens * case.rows, case.trained, free)


def answer(model, tokenizer, prompt: str, tokens: int) -> str:
    return sft.generate_answers(model, tokenizer, [sft.Prompt(prompt, tokenizer(prompt)["input_ids"])], tokens)[prompt]


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
WORKSPACE: dict[object, Callable[..., int]] = {
    torch.ops.bitsandbytes.gemm_4bit.default: nf4_matmul_workspace,
    torch.ops.torch_attn._varlen_attn_backward.default: attention_backward_workspace,
}
# Kernels that one operator starts, where it is not one; from the operators' sources.
KERNELS = {"bitsandbytes::gemm_4bit": 4, "torch_attn::_varlen_attn": 2, "torch_attn::_varlen_attn_backward": 5}
NO_KERNEL = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view",
             "aten::lift_fresh", "aten::_local_scalar_dense", "prim::device"}  # fmt: skip


class Trace(TorchDispatchMode):
    """Count the bytes alive on the card, their peak, the operators, and the values that the CPU waits for."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.waits = 0
        self.operators: Counter[str] = Counter()
        self.kernels = 0
        self.scalar: Callable[[], float] = float  # what the CPU reads whenever it asks the card for a value
        self._known: weakref.WeakSet = weakref.WeakSet()
        self._lone: tuple[int, int] | None = None

    def start(self) -> None:
        """Forget the peak and the counts, keep what is alive."""
        gc.collect()
        self.peak, self.waits, self.kernels = self.live, 0, 0
        self.operators.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a question of autograd's, not an operator
            return args[0].fake_device
        if func is aten.add.Tensor and self._sums_in_place(*args):
            func = aten.add_.Tensor
        self._count(func, args)
        if func is aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.waits += 1
            return self.scalar()
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._add(tensor.untyped_storage())
        workspace = WORKSPACE[func](*args, **kwargs) if func in WORKSPACE else 0
        self.peak = max(self.peak, self.live + workspace)
        return result

    def calibrate(self) -> None:
        """Learn what the reference counts of a gradient are that nobody else holds when autograd adds to it."""
        x = torch.ones(1, device="cuda", requires_grad=True)
        y = x * 1
        self._lone = None
        (y * 2 + y * 3).backward()
        assert self._lone, "autograd added no gradients"

    def _sums_in_place(self, total, other) -> bool:
        """Whether autograd would add `other` to a gradient in place: it never does for fake tensors, only for real ones.

        The condition is that of can_accumulate_inplace in torch/csrc/autograd/input_buffer.cpp. Within backward
        gradients are off, except where a layer is recomputed.
        """
        if torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
            return False
        references = total._use_count(), torch._C._storage_Use_Count(total.untyped_storage()._cdata)
        if self._lone is None:
            self._lone = references
        return references == self._lone and torch._debug_has_internal_overlap(total) == 0

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


def declare_kernels() -> list[str]:
    """Tell the dispatcher of the CUDA kernels that this torch build lacks; returns the operators' names.

    An operator that has both a formula for any device and a kernel of its own is taken apart where the kernel is
    missing: SiLU's backward would make five tensors in place of one. Fake tensors never run the kernel.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

    def lacking(name: str) -> bool:
        return (
            has_kernel(name, "CompositeImplicitAutograd") and has_kernel(name, "CPU") and not has_kernel(name, "CUDA")
        )

    def kernel(*args):
        raise AssertionError("a kernel ran on a fake tensor")

    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::") and lacking(name)]
    names.append("aten::_fused_rms_norm")  # it has no kernel for CPUs
    for name in names:
        CUDA_KERNELS.impl(name.removeprefix("aten::"), kernel, "CUDA")
    return names


CUDA_KERNELS = torch.library.Library("aten", "IMPL")  # the declarations last as long as this


# ---- The model ---------------------------------------------------------------------------------------


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer, double quantised NF4; made by hand, for its Params4bit cannot wrap a fake tensor."""

    def __init__(self, ins: int, outs: int, dtype: torch.dtype, compute_dtype: torch.dtype):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = ins, outs, None
        self.compute_dtype, self.compute_type_is_set, self.quant_storage = compute_dtype, True, torch.uint8
        self.support_avx512bf16_for_cpu = False
        blocks = outs * ins // 64
        scales = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        self.quant_state = QuantState(
            torch.empty(blocks, dtype=torch.uint8), shape=torch.Size((outs, ins)), code=torch.empty(16), blocksize=64,
            quant_type="nf4", dtype=dtype, offset=torch.empty(()), state2=scales,
        )  # fmt: skip
        self.weight = torch.nn.Parameter(torch.empty(outs * ins // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state, self.weight.quant_type = self.quant_state, "nf4"
        self.weight.compress_statistics = True


class Card:
    """A fake card: its fake tensors (`mode`) and what is counted on them (`trace`)."""

    def __init__(self):
        self.mode, self.trace = FakeTensorMode(allow_non_fake_inputs=True), Trace()
        declare_kernels()
        with self.on():
            self.trace.calibrate()

    @contextlib.contextmanager
    def on(self):
        with self.mode, self.trace:
            yield

    def put(self, batch: dict) -> dict:
        """The batch's tensors on the card; the copies are counted."""
        with self.mode:
            fake = {name: self.mode.from_tensor(x) if torch.is_tensor(x) else x for name, x in batch.items()}
        with self.on():
            return {name: x.to("cuda") if torch.is_tensor(x) else x for name, x in fake.items()}

    @contextlib.contextmanager
    def answering(self, gib: float):
        """torch.cuda's questions about memory, answered for a card of this size by the trace."""
        trace, total = self.trace, round(gib * GIB)
        answers = {
            "empty_cache": gc.collect,
            "reset_peak_memory_stats": lambda *_: trace.start(),
            "max_memory_reserved": lambda *_: trace.peak,
            "max_memory_allocated": lambda *_: trace.peak,
            "memory_reserved": lambda *_: trace.live,
            "memory_allocated": lambda *_: trace.live,
            "mem_get_info": lambda *_: (total - round(CONTEXT * GIB) - trace.live, total),
            "get_device_properties": lambda *_: mock.Mock(total_memory=total),
            "synchronize": lambda *_: None,
        }
        with contextlib.ExitStack() as stack:
            for name, function in answers.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, function))
            yield


def make_model(case: Case, card: Card):
    """The trainer's model for this case on fake CUDA: frozen base, its loss, its adapters."""
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    config = LlamaConfig(**LLAMA31_8B | {"num_hidden_layers": case.layers})
    with card.on(), torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_name())
        if case.nf4:
            for layer in model.model.layers:
                for parent in (layer.self_attn, layer.mlp):
                    for name, linear in list(parent.named_children()):
                        if name in PROJECTIONS:
                            setattr(
                                parent, name, Linear4bit(linear.in_features, linear.out_features, dtype, torch.bfloat16)
                            )
            model.is_loaded_in_4bit = True  # PEFT asks
        model.requires_grad_(False)
        install_loss(model)
        model = add_adapters(model, case)
    gc.collect()
    return model


def layers_of(model):
    return model.get_base_model().get_decoder().layers


def row_of(case: Case) -> dict:
    """One packed row as the trainer's data side yields it."""
    length = case.tokens // case.documents
    lengths = [length] * (case.documents - 1) + [case.tokens - length * (case.documents - 1)]
    ids = [np.arange(n, dtype=np.int32) for n in lengths]
    labels = [
        np.where(np.arange(n) < round(n * (1 - case.trained)), -100, np.arange(n)).astype(np.int32) for n in lengths
    ]
    return {"input_ids": ids, "labels": labels, "file": ["data"] * len(ids), "line": list(range(len(ids)))}


class LongestRow:
    """What the trainer asks of its rows when it measures."""

    def __init__(self, case: Case):
        self.row = row_of(case)

    def longest(self) -> dict:
        return self.row


# ---- What is traced ----------------------------------------------------------------------------------


def trained_of(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count_sum(parameter) -> None:
    parameter.sums += 1


def forget_gradients(model) -> None:
    model.zero_grad()
    for parameter in trained_of(model):
        parameter.sums = 0


def check_gradients(model, sums: int) -> None:
    """Each trained parameter has a gradient of its own shape and dtype on the card, the sum of so many; no other has."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert (gradient is not None) == parameter.requires_grad, name
        if gradient is not None:
            assert gradient.shape == parameter.shape and gradient.dtype == parameter.dtype == torch.float32, name
            assert gradient.device.type == parameter.device.type == "cuda", name
            assert parameter.sums == sums, f"{name}: {parameter.sums} gradients"


def micro_step(card: Card, model, batch: dict) -> None:
    """Forward and backward of one batch."""
    with card.on():
        loss = model.train()(**batch, num_items_in_batch=1000).loss
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
        loss.backward()


def kept(card: Card, model, case: Case) -> dict:
    """Bytes that one forward leaves for backward."""
    choose_checkpointing(model, case)
    batch = card.put(collate([row_of(case)] * case.rows))
    with card.on():
        loss = model.train()(**batch, num_items_in_batch=1000).loss
        after = card.trace.live
        del loss
        gc.collect()
    return {"kept": after - card.trace.live}


def step(card: Card, model, case: Case) -> dict:
    """The second of two micro-steps, when all gradients exist: bytes, operators, kernels."""
    free, _ = choose_checkpointing(model, case)
    forget_gradients(model)
    batch = card.put(collate([row_of(case)] * case.rows))
    micro_step(card, model, batch)
    card.trace.start()
    micro_step(card, model, batch)
    check_gradients(model, sums=2)
    return {
        "free": free,
        "peak": card.trace.peak,
        "operators": sum(card.trace.operators.values()),
        "kernels": card.trace.kernels,
        "waits": card.trace.waits,
        "planned": planned(case, free),
    }


def measured(card: Card, model, case: Case, gib: float) -> dict:
    """What the trainer chooses after measuring on a card of this size, that step's peak, and that of the next choice."""
    with card.answering(gib), card.on():
        free, rows = choose_checkpointing(model, dataclasses.replace(case, checkpointing="auto"))
    chosen = dataclasses.replace(case, checkpointing=case.layers - free, rows=rows)
    if free < case.layers:
        more = dataclasses.replace(chosen, checkpointing=case.layers - free - 1)
    else:
        more = dataclasses.replace(chosen, rows=2 * rows)  # --grad-accum is a power of two
    return step(card, model, chosen) | {"rows": rows, "next": step(card, model, more)["peak"]}


def sums(card: Card, model, case: Case) -> dict:
    """Additions of one small step, by real tensors on the CPU and by fake ones: those in place, and those with a copy.

    Real ones are counted by the profiler, for autograd adds nothing in place where it sees a dispatch mode.
    """
    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    batch = collate([row_of(dataclasses.replace(case, tokens=64))])
    inputs = {name: x for name, x in batch.items() if name not in ("cu_seq_lens_q", "max_length_q")}

    def small_model():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA31_8B | small), attn_implementation="sdpa")
        model.requires_grad_(False)
        install_loss(model)
        return add_adapters(model, case).train()

    real = small_model()
    with torch.autograd.profiler.profile() as profile:
        real(**inputs).loss.backward()
    counted = Counter(event.name for event in profile.function_events)
    fake_inputs = {name: card.mode.from_tensor(x) if torch.is_tensor(x) else x for name, x in inputs.items()}
    with card.on():
        fake = small_model()
        card.trace.start()
        fake(**fake_inputs).loss.backward()
    names = ("aten::add", "aten::add_")
    return {"real": [counted[name] for name in names], "fake": [card.trace.operators[name] for name in names]}


def compiled(card: Card, model, case: Case) -> dict:
    """Two batches of different lengths through layers compiled up to code generation; torch.compile refuses a trace."""
    from torch._dynamo.utils import counters

    choose_checkpointing(model, case)
    forget_gradients(model)
    compile_layers(model, "aot_eager")
    for count, batch_case in enumerate((case, dataclasses.replace(case, tokens=1000, documents=3)), 1):
        batch = card.put(collate([row_of(batch_case)] * case.rows))
        with card.mode:
            model.train()(**batch, num_items_in_batch=1000).loss.backward()
        check_gradients(model, sums=count)
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}


def evaluation(card: Card, model, case: Case) -> dict:
    """The held-out loss of the second of two batches, without gradients: the adapters' copies are there already."""
    batch = card.put(collate([row_of(case)] * case.rows))
    with card.on(), torch.no_grad():
        loss = model.eval()(**batch, num_items_in_batch=1).loss
        del loss
        card.trace.start()
        before = card.trace.live
        loss = model(**batch, num_items_in_batch=1).loss
        assert loss.shape == () and loss.dtype == torch.float32 and not loss.requires_grad
        left = card.trace.live - before
    return {"peak": card.trace.peak - before, "left": left, "waits": card.trace.waits}


class Unread:
    """A tokenizer whose answers are counted, not read: fake ids have no values."""

    def __init__(self, tokenizer):
        self.tokenizer, self.lengths = tokenizer, []  # of the answers, in tokens

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def decode(self, ids, **kwargs) -> str:
        assert ids.device.type == "cuda" and ids.dtype == torch.int64
        self.lengths.append(len(ids))
        return ""


def generation(card: Card, model, case: Case, tokens: int) -> dict:
    """A greedy answer of so many tokens through the trainer's own function, with the key-value cache."""
    import parts
    from transformers import AutoTokenizer

    tokenizer = Unread(AutoTokenizer.from_pretrained(parts.llama31_tokenizer()))
    tokenizer.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with card.on():
        card.trace.start()
        chosen = card.trace.operators
        card.trace.scalar = lambda: float(chosen["aten::argmax"] >= tokens)  # "is the answer finished?"
        answer(model, tokenizer, "Qui es-tu ?", tokens)
        card.trace.scalar = float
    return {"tokens": tokenizer.lengths, "operators": dict(card.trace.operators), "waits": card.trace.waits}


JOBS = {"step": step, "kept": kept, "evaluation": evaluation, "generation": generation, "measured": measured, "compiled": compiled,
        "sums": sums}  # fmt: skip


def main() -> None:
    """Do the jobs that standard input names, one JSON object a line: `job`, `options`, and the fields of `Case`."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    card, made, model = Card(), None, None
    for line in sys.stdin:
        fields = json.loads(line)
        job, options = JOBS[fields.pop("job", "step")], fields.pop("options", {})
        case = Case(**fields)
        build = case.nf4, case.bf16, case.dropout, case.r, case.layers
        try:
            if build != made:
                model = None
                model, made = make_model(case, card), build
            result = job(card, model, case, **options)
        except Exception:
            result, made = {"error": traceback.format_exc()}, None
        print(json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)  # at a normal exit, autograd's threads for the fake card sometimes abort the process


if __name__ == "__main__":
    main()
