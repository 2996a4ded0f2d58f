"""Branches that only a machine with GPUs takes, forced on a CPU: real libraries, and a stand-in for the card alone.

What a stand-in cannot show (kernels, real memory, NCCL) is what `benchmarks/gpu.py` is for.
"""

import os

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from runs import arguments, assert_says, error_of
from torch import nn

import train_sft_dolores as sft

sft.load_libraries()
WORLD = sft.World()


# ---- the device ----


def test_one_process_uses_one_gpu(monkeypatch, tmp_path):
    """On a machine with two, Trainer would wrap the model in DataParallel, halve the steps and add up the losses."""
    setup = transformers.TrainingArguments.__post_init__

    def post_init(self):
        setup(self)
        self._n_gpu = 2

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", post_init)
    assert transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True).n_gpu == 2
    assert sft.training_arguments(arguments(), evaluating=False).n_gpu == 1


def test_torch_for_cuda_without_a_gpu_is_not_a_cpu_run(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = error_of(sft.choose_device, arguments(), WORLD)
    assert_says(said, "GPU", "13.0", "580", "525", "CUDA_VISIBLE_DEVICES=")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU was asked for
    assert sft.choose_device(arguments(), WORLD).type == "cpu"


def test_wsl(monkeypatch):
    """Neither expandable segments nor paged memory."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert sft.optimizer_on("paged_adamw_8bit", "cuda") == "paged_adamw_8bit"
    monkeypatch.setattr(sft, "ON_WSL", True)
    assert [sft.optimizer_on(optim, "cuda") for optim in sft.OPTIMIZERS] == [
        "adamw_8bit", "adamw_8bit", "adamw_torch", "adamw_torch", "adamw_torch_fused"
    ]  # fmt: skip
    assert sft.optimizer_on("paged_adamw_8bit", "cpu") == "adamw_torch"
    sft.set_allocator(True, 128)
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "max_split_size_mb:128"


def test_float16_is_not_offered(capsys):
    """It would train with wrong gradients: there is no loss scaling."""
    with pytest.raises(SystemExit):
        sft.parse_args(["--bnb-dtype", "float16"])
    assert "--bnb-dtype" in capsys.readouterr().err


# ---- out of memory, however it is said ----

SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SAID, ids=lambda error: str(error)[:40])
def test_out_of_memory_is_recognized(error):
    assert sft.out_of_memory(error)


def test_other_errors_are_not_out_of_memory():
    assert not sft.out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not sft.out_of_memory(ValueError("out of memory"))


# ---- the paged optimizer's state ----


class Managed(bitsandbytes.optim.PagedAdamW8bit):
    """A paged optimizer whose managed memory is ordinary memory with bitsandbytes' mark: the real one needs CUDA."""

    def get_state_buffer(self, p, dtype=torch.float32):
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged, buffer.managed = True, True
        return buffer


@pytest.mark.parametrize("mark_survives", [False, True], ids=["one process", "several processes"])
def test_a_loaded_optimizer_state_is_paged_again(mark_survives):
    parameter = nn.Parameter(torch.randn(512, 256))
    saved = {name: torch.randint(0, 255, (512, 256), dtype=torch.uint8) for name in ("state1", "state2")}
    for value in saved.values():
        if mark_survives:
            value.is_paged = True
    optimizer = Managed([parameter])
    optimizer.state[parameter] = {"step": 3, **saved}
    sft.restore_paging(optimizer)
    for name, value in saved.items():
        state = optimizer.state[parameter][name]
        assert state.managed and state.is_paged and torch.equal(state, value) and state is not value
    assert optimizer.state[parameter]["step"] == 3


def test_other_optimizers_keep_their_state():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    state = optimizer.state[parameter] = {"state1": torch.ones(4)}
    sft.restore_paging(optimizer)
    assert optimizer.state[parameter] is state and torch.equal(state["state1"], torch.ones(4))


# ---- several processes ----


def test_adapters_are_loaded_onto_the_process_s_own_device(short_smollm2, monkeypatch, tmp_path):
    """PEFT would take cuda:0 in every process: forced here by letting it find a GPU that is not there."""
    args = arguments("--model", short_smollm2, "--no-bf16", "--no-bnb-nf4", "--lora-r", 4)
    base = sft.find_base(args, str(short_smollm2))
    rows = [{"input_ids": [[1, 2, 3]]}]
    plan = sft.Plan(args, WORLD, {}, {}, [], None, base, rows)
    model = sft.load_model(plan, args.lora_target_modules, torch.device("cpu"))
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda:0")
    model.load_adapter(str(tmp_path / "adapter"), "default")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_what_is_held_out_does_not_grow_without_bound():
    digests = np.arange(100_000)
    assert sft.hold_out(digests, 0.05, seed=0).sum() == 500
    assert sft.hold_out(digests[:1000], 0.05, seed=0).sum() == 50
