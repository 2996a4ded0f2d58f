"""The CUDA path at the width of Llama-3.1-8B, traced on fake CUDA tensors (tests/fake_cuda): no GPU needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TRACER = Path(__file__).parent / "fake_cuda" / "tracer.py"
GIB = 2**30

# What a step needs is a line in the number of layers: two and eight show it.
STEPS = [
    {"checkpointing": "all"},
    {"checkpointing": 1},
    {"checkpointing": "none"},
    {"checkpointing": "all", "tokens": 8192},
    {"checkpointing": "none", "rows": 2},
    {"checkpointing": "none", "dropout": 0},
    {"checkpointing": "all", "nf4": False},
]
LOADING = {"job": "loading"}
EVALUATION = {"job": "evaluation"}
GENERATION = {"job": "generation", "options": {"tokens": 4}}
MEASURED = {"job": "measured", "layers": 8, "tokens": 4096, "card": 11}
EIGHT = {"layers": 8}


def case_name(job: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in job.items())


@pytest.fixture(scope="module")
def traced() -> dict[str, dict]:
    """All jobs, done by one process: the device must be registered before torch is imported."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: it compiles the fake CUDA device")
    jobs = [{"layers": 2} | job for job in (LOADING, EVALUATION, GENERATION, *STEPS, MEASURED, EIGHT)]
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
def test_a_step(job, found):
    """The tracer has checked the gradients; the CPU never waits for the card."""
    answer = found(job)
    assert answer["spared"] == {"all": 0, "none": 2}.get(job["checkpointing"], 1)
    assert answer["waits"] == 0


def gib_planned(answer: dict) -> float:
    """The plan without what a micro-step does not show: the optimizer has not run, the driver is not there."""
    optimizer = answer["planned"]["adapters and optimizer"] * 2 / 10  # two of ten bytes a parameter
    return sum(answer["planned"].values()) - answer["planned"]["CUDA"] - optimizer


@pytest.mark.parametrize("job", [EIGHT, *(step for step in STEPS if step["checkpointing"] == "all")], ids=case_name)
def test_the_memory_plan_is_that_of_the_trace(job, found):
    """With all layers recomputing: hardly below, and little above."""
    assert -0.01 < gib_planned(found(job)) - found(job)["peak"] / GIB < 0.1


def test_flops_are_those_counted_by_hand(found):
    """GFLOP a token: two documents' worth of attention pairs, no head for untrained tokens, no gradient of the base."""
    hidden, inner, kv, vocabulary, tokens, trained, r, layers = 4096, 14336, 1024, 128256, 2048, 0.68, 32, 8
    weights = 2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner
    lora = r * (2 * 2 * hidden + 2 * (hidden + kv) + 3 * (hidden + inner))
    pairs = (tokens / 5 + 1) / 2 * hidden  # of a token with those before it in its document
    forward, backward = 2 * (weights + lora) + 4 * pairs, 2 * weights + 4 * lora + 10 * pairs
    head = 4 * trained * hidden * vocabulary
    # The recomputation stops before down_proj's lora_B, whose result backward does not need.
    again = forward - 2 * r * hidden
    assert found(EIGHT)["gflop"] == pytest.approx((layers * (forward + again + backward) + head) / 1e9, rel=2e-3)


def test_loading_and_the_self_check(found):
    """One line, within 1.3 GiB, nothing left; packed documents run in varlen_attn, forward, recomputed and backward."""
    answer = found(LOADING)
    assert answer["attention"] == "packed" and answer["printed"].count("checked ") == 1, answer["printed"]
    checked = answer["checked"]
    assert checked["left"] == 0 and checked["peak"] < 1.3 * GIB
    assert checked["operators"]["torch_attn::_varlen_attn"] == 3  # two layers, one of them once more
    assert checked["operators"]["torch_attn::_varlen_attn_backward"] == 2


def test_evaluation(found):
    answer = found(EVALUATION)
    assert answer["waits"] == 0
    assert answer["left"] <= 512  # the loss
    assert answer["peak"] < found({"checkpointing": "all"})["peak"]


def test_generation(found):
    answer = found(GENERATION)
    assert answer["tokens"] == {"Qui es-tu ?": "4"}
    assert answer["operators"]["bitsandbytes::gemm_4bit"] == 4 * 2 * 7  # one forward a token, seven projections a layer
    assert "torch_attn::_varlen_attn" not in answer["operators"]  # no packed rows here


def test_measured_checkpointing(found):
    """As many layers as fit, out of memory on the way: an eighth more would not fit, and nothing of a try is left."""
    answer = found(MEASURED)
    limit = 0.95 * (11 - 0.7) * GIB
    assert 0 < answer["spared"] < 8
    assert answer["peak"] < limit < answer["next"]
    assert answer["left"] == 0
