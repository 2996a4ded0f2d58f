"""A test that fails or is interrupted leaves no process behind, not even one in a session of its own."""

import contextlib
import random
import signal
import sys
from pathlib import Path

import psutil
import pytest
from runs import launch, wait_until

FAILING = """
import time
from runs import launch

def test(tmp_path):
    launch(["sh", "-c", "setsid sleep {seconds} & sleep {seconds}"], tmp_path, "log")
    time.sleep({pause})
    assert False
"""


def sleeping(seconds: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline() == ["sleep", seconds]:
                found.append(process)
    return found


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM], ids=["failure", "SIGINT", "SIGTERM"])
def test_processes_end_with_their_test(number, tmp_path):
    seconds = f"600.{random.randrange(10**9)}"  # to recognise them
    (tmp_path / "test_inner.py").write_text(FAILING.format(seconds=seconds, pause=600 if number else 2))
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--rootdir", tmp_path, "test_inner.py"]
    pytest_process = launch(command, tmp_path, "pytest.txt", PYTHONPATH=str(Path(__file__).parent))
    wait_until(lambda: len(sleeping(seconds)) == 2, pytest_process, tmp_path / "pytest.txt", timeout=60)
    if number:
        pytest_process.send_signal(number)
    # 1: tests failed, 2: interrupted
    assert pytest_process.wait(60) == (2 if number else 1), (tmp_path / "pytest.txt").read_text()
    assert sleeping(seconds) == []
