"""Shared parts: real weights and real vocabularies, made once (tests/parts.py)."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# No test may reach for the network on its own; what is needed comes from packages.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import parts  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def signals():
    """What main makes of SIGINT and SIGTERM ends with the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return parts.smollm2()


@pytest.fixture(scope="session")
def tiny_llama31() -> Path:
    return parts.tiny_llama31()


@pytest.fixture(scope="session")
def llama31_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(parts.llama31_tokenizer())


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(parts.smollm2())


@pytest.fixture(scope="session")
def short_smollm2() -> Path:
    return parts.short_smollm2()
