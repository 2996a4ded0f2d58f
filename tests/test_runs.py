"""A test that is interrupted leaves no process behind, not even one in a session of its own."""

import contextlib
import random
import sys
from pathlib import Path

import psutil
from runs import launch, wait_until

INNER = """
import time
from runs import launch

def test(tmp_path):
    launch(["sh", "-c", "setsid sleep {seconds} & sleep {seconds}"], tmp_path, "log")
    time.sleep(600)
"""


def sleeping(seconds: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline() == ["sleep", seconds]:
                found.append(process)
    return found


def test_processes_end_with_their_test(tmp_path):
    """SIGTERM is what pytest does not handle itself: after a failure or Ctrl-C it tears the same fixture down."""
    seconds = f"600.{random.randrange(10**9)}"  # to recognise them
    (tmp_path / "test_inner.py").write_text(INNER.format(seconds=seconds))
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--rootdir", tmp_path, "test_inner.py"]
    inner = launch(command, tmp_path, "pytest.txt", PYTHONPATH=str(Path(__file__).parent))
    wait_until(lambda: len(sleeping(seconds)) == 2, inner, tmp_path / "pytest.txt", timeout=60)
    inner.terminate()
    assert inner.wait(60) == 2, (tmp_path / "pytest.txt").read_text()  # interrupted
    assert sleeping(seconds) == []
