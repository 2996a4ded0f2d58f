"""The CUDA path at Llama-3.1-8B's full shape, traced on fake CUDA tensors (tests/fake_cuda): no GPU needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_sft_dolores as sft

pytestmark = pytest.mark.slow  # the traces take minutes
TRACER = Path(__file__).parent / "fake_cuda" / "tracer.py"
GIB = 2**30
LLAMA31_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}  # fmt: skip

# What a step needs is a line in the number of layers, so most cases have two.
STEPS = [
    {"checkpointing": "all"},
    {"checkpointing": 1},
    {"checkpointing": "none"},
    {"checkpointing": "all", "tokens": 8192},
    {"checkpointing": "none", "tokens": 8192},
    {"checkpointing": "none", "rows": 2},
    {"checkpointing": "none", "trained": 0.05},
    {"checkpointing": "all", "dropout": 0},
    {"checkpointing": "none", "dropout": 0},
    {"checkpointing": "none", "dropout": 0, "tokens": 8192},
    {"checkpointing": "all", "nf4": False},
    {"checkpointing": "none", "nf4": False, "tokens": 8192},
    {"checkpointing": "all", "r": 8},
    {"checkpointing": "none", "r": 128},
]
FULL = {"checkpointing": "none", "layers": 32}
EVALUATION = {"job": "evaluation"}
GENERATION = {"job": "generation", "options": {"tokens": 4}}
SUMS = [{"job": "sums"}, {"job": "sums", "dropout": 0}]
COMPILED = {"job": "compiled", "dropout": 0}
MEASURED = {"job": "measured", "layers": 6, "tokens": 4096, "options": {"gib": 6}}
ROWS = {"job": "measured", "options": {"gib": 8}}


def case_name(job: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in job.items())


@pytest.fixture(scope="module")
def traced() -> dict[str, dict]:
    """All jobs, done by one process: the device must be registered before torch is imported.

    Neighbours of one shape share a model.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: it compiles the fake CUDA device")
    jobs = [
        {"layers": 2} | job
        for job in (SUMS[0], EVALUATION, GENERATION, *STEPS, SUMS[1], COMPILED, ROWS, FULL, MEASURED)
    ]
    done = subprocess.run(
        [sys.executable, str(TRACER)], input="\n".join(map(json.dumps, jobs)), capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = map(json.loads, done.stdout.splitlines())
    return dict(zip(map(case_name, jobs), found, strict=True))


@pytest.fixture
def found(traced):
    def result(job: dict) -> dict:
        answer = traced[case_name({"layers": 2} | job)]
        assert "error" not in answer, answer["error"]
        return answer

    return result


@pytest.mark.parametrize("job", STEPS, ids=case_name)
def test_step_and_memory_plan(job, found):
    """The tracer has checked the gradients; the CPU never waits for the card; the plan is what is traced."""
    answer = found(job)
    expected = {"all": 0, "none": 2}.get(job["checkpointing"], 1)
    assert answer["free"] == expected
    assert answer["waits"] == 0
    assert planned_in_trace(answer) == pytest.approx(answer["peak"] / GIB, abs=0.009)


def test_full_depth(found):
    """The documented run on a card with room for it: 94.8 kB a token and layer, and not 5,000 kernels."""
    answer = found(FULL)
    assert answer["free"] == 32
    assert answer["kernels"] <= 5000
    assert planned_in_trace(answer) == pytest.approx(answer["peak"] / GIB, abs=0.009)
    assert answer["planned"]["activations"] * GIB / 32 / 2048 == pytest.approx(94_800, abs=100)


def planned_in_trace(answer: dict) -> float:
    """GiB of the plan's parts that a micro-step shows: the optimizer has not run, the driver is not there."""
    outside = ("optimizer state", "CUDA context")
    return sum(amount for name, amount in answer["planned"].items() if name not in outside)


@pytest.mark.parametrize("job", SUMS, ids=case_name)
def test_gradients_are_summed_as_for_real_tensors(job, found):
    """Autograd adds to a gradient in place where it may, but never for fake tensors: the tracer does it for them."""
    answer = found(job)
    assert answer["fake"] == answer["real"]


def test_evaluation(found):
    answer = found(EVALUATION)
    assert answer["waits"] == 0
    assert answer["left"] <= 512  # the loss
    assert answer["peak"] < found({"checkpointing": "all"})["peak"]


def test_generation(found):
    answer = found(GENERATION)
    assert answer["tokens"] == [4]
    assert answer["operators"]["bitsandbytes::gemm_4bit"] == 4 * 2 * 7  # one forward a token, seven projections a layer
    assert "torch_attn::_varlen_attn" not in answer["operators"]  # no packed rows here


def test_compile(found):
    """One graph for both layers and both lengths, up to code generation."""
    assert found(COMPILED) == {"graphs": 1, "breaks": {}}


def test_measured_checkpointing(found):
    """As many layers as fit below 95 % of what the driver leaves: one more would not."""
    answer = found(MEASURED)
    limit = 0.95 * (6 - answer["planned"]["CUDA context"]) - answer["planned"]["optimizer state"]
    assert 0 < answer["free"] < 6 and answer["rows"] == 1
    assert answer["peak"] / GIB <= limit < answer["next"] / GIB


def test_measured_rows(found):
    """Where no layer needs checkpointing, as many rows at once as fit and as divide a step's rows."""
    answer = found(ROWS)
    limit = 0.95 * (8 - answer["planned"]["CUDA context"]) - answer["planned"]["optimizer state"]
    assert answer["free"] == 2 and answer["rows"] in (2, 4, 8, 16)
    assert answer["peak"] / GIB <= limit < answer["next"] / GIB


# ---- Choosing the layers, on the plan's peaks (held against the trace above) ------------------------


def peaks(length: int, rows: int, dropout: float, card: float) -> tuple[list[int], int]:
    """(bytes at the peak of a step with 0, 1, 2 ... uncheckpointed layers, the limit on a card of so many GiB)."""
    args = sft.parse_args(["--lora-dropout", str(dropout)])
    plans = [sft.memory_plan(args, sft.World(), LLAMA31_8B, length * rows, 0.68, layers) for layers in range(33)]
    outside = ("optimizer state", "CUDA context")
    limit = 0.95 * 0.95 * card - plans[0]["optimizer state"]
    return [round(GIB * sum(n for name, n in plan.items() if name not in outside)) for plan in plans], round(
        GIB * limit
    )


@pytest.mark.parametrize("dropout", [0, 0.05])
@pytest.mark.parametrize(("length", "rows", "card"), [(2048, 1, 23.5), (4096, 1, 23.5), (8192, 1, 23.5), (2048, 2, 23.5),
                                                      (2048, 8, 79.2), (2048, 32, 79.2), (8192, 1, 8)])  # fmt: skip
def test_as_many_layers_as_fit(length, rows, card, dropout):
    at, limit = peaks(length, rows, dropout, card)
    steps = []

    def peak(layers: int) -> int:
        steps.append(layers)
        return at[layers] if at[layers] < card * GIB else sys.maxsize

    fitting = max((layers for layers in range(1, 33) if at[layers] <= limit), default=0)
    assert sft.most_that_fit(32, peak, limit) == fitting
    assert len(steps) <= 3


@pytest.mark.parametrize("layers", [1, 2, 3, 32])
def test_layers_that_fit_at_the_edges(layers):
    that_fit = sft.most_that_fit
    assert that_fit(layers, lambda n: 10 + n, 10) == 0
    assert that_fit(layers, lambda n: 10 + n, 11) == 1
    assert that_fit(layers, lambda n: 10 + n, 1000) == layers
    assert that_fit(layers, lambda n: 10 + n if n < 2 else sys.maxsize, 1000) == 1


def test_layers_are_lowered_until_they_fit():
    """A fragmented allocator's peaks are no line."""
    assert 8 <= sft.most_that_fit(32, lambda n: n if n <= 4 else 3 * n, 30) <= 10
