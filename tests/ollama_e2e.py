"""`make test-ollama`: merged folders in a real Ollama, compared with training's text and transformers' answers.

    python tests/ollama_e2e.py

`merge_lora.py --check-ollama` must be content with SmolLM2 in two chat formats, as Q8_0. As BF16 its greedy answers must be
those of transformers, where two tokens are not nearly equally probable. Llama 3.1's vocabulary is on a random model, which
may write bytes that are not UTF-8, and then Ollama reports no count: text, and the counts that there are.

Needs an `ollama` binary on PATH; without one it prints that and succeeds. It starts its own server on a free port
with its own model folder; the user's models are not touched.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import parts  # noqa: E402

import merge_lora  # noqa: E402

LENGTH = 24  # maximum tokens of an answer
TIE = 0.05  # nats


@contextlib.contextmanager
def serve(binary: str, work: Path) -> Iterator[None]:
    """A server on a free port, with its models and its log in `work`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(work / "models")}
    with open(work / "ollama.log", "w") as log:
        server = subprocess.Popen([binary, "serve"], stdout=log, stderr=log)
    try:
        for _ in range(120):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5).close()
                break
            time.sleep(0.5)
        else:
            raise SystemExit(f"ollama serve did not come up: {(work / 'ollama.log').read_text()[-2000:]}")
        yield
    finally:
        server.terminate()
        server.wait()


def created(name: str, base: Path, chat_format: str, work: Path, *options: str) -> Path:
    """A base merged with a random adapter, as the model `name` of the running server."""
    from engine import random_adapter

    adapter = random_adapter(base, work / f"{name}-adapter", chat_format)
    merge_lora.main(["--adapter", str(adapter), "--output", str(work / name), "--name", name, *options])
    subprocess.run(["ollama", "create", name, "-f", str(work / name / "Modelfile")], check=True)
    return work / name


def check_prompts(name: str, merged: Path) -> int:
    """How many chats Ollama renders or counts otherwise than training."""
    from transformers import AutoTokenizer

    tokenizer, wrong, counted = AutoTokenizer.from_pretrained(merged), 0, 0
    for chat in merge_lora.CHECKED_CHATS:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        expected = len(tokenizer(text, add_special_tokens=False).input_ids)
        rendered = merge_lora.ask_ollama(name, chat, _debug_render_only=True)["_debug_info"]["rendered_template"]
        count = merge_lora.ask_ollama(name, chat, options={"temperature": 0, "num_predict": 1}).get("prompt_eval_count")
        if tokenizer.bos_token + rendered != text or count not in (None, expected):
            wrong += 1
            print(f"DIFFERS  {expected} tokens, {text!r}\n  Ollama {count}, {rendered!r}")
        counted += count is not None
    print(f"{name}: {counted} of {len(merge_lora.CHECKED_CHATS)} prompts have a number of tokens in Ollama")
    return wrong + (counted < len(merge_lora.CHECKED_CHATS) / 2)


def check_answers(name: str, merged: Path) -> int:
    """How many greedy answers differ where the two tokens are no tie."""
    from engine import answers_of_transformers, gap_at_first_difference
    from transformers import AutoTokenizer

    tokenizer, wrong, chats = AutoTokenizer.from_pretrained(merged), 0, merge_lora.CHECKED_CHATS
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in chats]
    for chat, prompt, ids in zip(chats, prompts, answers_of_transformers(merged, prompts, LENGTH), strict=True):
        answer = merge_lora.ask_ollama(name, chat, options={"temperature": 0, "num_predict": LENGTH})
        ours, theirs = tokenizer.decode(ids, skip_special_tokens=True).strip(), answer["message"]["content"].strip()
        if ours == theirs:
            continue
        its = [*tokenizer(theirs, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        gap = gap_at_first_difference(merged, prompt, ids, its)
        wrong += gap >= TIE
        print(f"{'tie' if gap < TIE else 'DIFFERS'}, {gap:.3f} nats  {chat[-1]['content']!r}: {theirs!r} not {ours!r}")
    return wrong


def main() -> None:
    binary = shutil.which("ollama")
    if binary is None:
        print("test-ollama: skipped, there is no ollama on PATH (https://ollama.com/download)")
        return
    with tempfile.TemporaryDirectory(prefix="ollama-e2e-") as folder, serve(binary, Path(folder)):
        work, wrong = Path(folder), 0
        for chat_format in ("dolores", "chatml"):
            merged = created(f"smollm2-{chat_format}", parts.smollm2(), chat_format, work, "--gguf-only")
            wrong += merge_lora.check_ollama(merged.name, merged)
        wrong += check_answers("smollm2", created("smollm2", parts.smollm2(), "chatml", work, "--gguf", "BF16"))
        wrong += check_prompts("llama31", created("llama31", parts.tiny_llama31(), "dolores", work))
    if wrong:
        raise SystemExit(f"test-ollama: {wrong} checks failed")
    print("test-ollama: text, tokens and answers are those of training and transformers")


if __name__ == "__main__":
    main()
