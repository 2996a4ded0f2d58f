"""Fixtures of all tests: real weights and real vocabularies (tests/parts.py), and an end to what a test started."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# No test may use the network on its own; what is needed comes from packages.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import parts  # noqa: E402
import pytest  # noqa: E402
import runs  # noqa: E402

# Several workers take a whole file each (its tests share runs), so the longest ones must not begin last.
LONGEST_FIRST = ["merge", "families", "engine", "faults", "benchmarks", "train", "cuda_path", "signals", "scale", "selfcheck",
                 "verdict"]  # fmt: skip


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_configure():
    """SIGTERM ends pytest as Ctrl-C does, so that fixtures are torn down and no process is left behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started pytest in the background


@pytest.fixture(autouse=True)
def end_processes():
    """Whatever a test started ends with it, also when it fails, times out or is interrupted."""
    yield
    runs.end_all()


@pytest.fixture(autouse=True)
def restore_signals():
    """`main` installs handlers for signals: they go with the test.

    SIGHUP is not ignored, as it is under nohup and after a merge: a child would inherit that.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def data_folder(tmp_path) -> Path:
    """A folder with 24 conversations in train.chatml."""
    (tmp_path / "train.chatml").write_text(runs.dialogues(24))
    return tmp_path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return parts.smollm2()


@pytest.fixture(scope="session")
def short_smollm2() -> Path:
    return parts.short_smollm2()


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
