"""`make test-ollama`: merged folders in a real Ollama, compared with transformers.

    python tests/ollama_e2e.py

Llama 3.1's vocabulary on a two-layer random model: every prompt must have the same text and the same number of tokens.
SmolLM2, imported in float32: the greedy answers must be the same, where Ollama splits the prompt alike (it does not know
SmolLM2's pre-tokenizer) and two tokens are not nearly equally probable.

Needs an `ollama` binary on PATH; without one it prints that and succeeds. It starts its own server on a free port
with its own model folder; the user's models are not touched.
"""

import contextlib
import json
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

QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is 2 + 2?", "Dis bonjour.", "Name a planet.",
             "Qui es-tu ?", "L'été, 12345 fois « déjà » !"]  # fmt: skip
HISTORY = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Hello, Ada."}]
CHATS = [[*before, {"role": "user", "content": q}] for q in QUESTIONS for before in ([], HISTORY)]
LENGTH = 24  # maximum tokens of an answer
TIE = 0.05  # nats


class Ollama:
    """A running server of our own."""

    def __init__(self, binary: str, port: int, environment: dict[str, str]):
        self.binary, self.port, self.environment = binary, port, environment

    def ask(self, path: str, **content) -> dict:
        data = json.dumps(content).encode() if content else None
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data, timeout=300) as answer:
            return json.load(answer)

    def create(self, name: str, folder: Path, *options: str) -> None:
        command = [self.binary, "create", *options, name, "-f", str(folder / "Modelfile")]
        subprocess.run(command, env=self.environment, check=True)

    def chat(self, name: str, chat: list[dict], **options) -> dict:
        settings = {"temperature": 0, "num_predict": LENGTH}
        return self.ask("/api/chat", model=name, messages=chat, stream=False, options=settings, **options)


@contextlib.contextmanager
def serve(binary: str, work: Path) -> Iterator[Ollama]:
    """A server on a free port, with its models and its log in `work`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(work / "models")}
    with open(work / "ollama.log", "w") as log:
        server = subprocess.Popen([binary, "serve"], env=environment, stdout=log, stderr=log)
    ollama = Ollama(binary, port, environment)
    try:
        for _ in range(120):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                ollama.ask("/api/version")
                break
            time.sleep(0.5)
        else:
            raise SystemExit(f"ollama serve did not come up: {(work / 'ollama.log').read_text()[-2000:]}")
        yield ollama
    finally:
        server.terminate()
        server.wait()


def merged_folder(base: Path, work: Path, name: str, chat_format: str) -> Path:
    """A base merged with a random adapter."""
    from engine import random_adapter

    import merge_lora

    adapter = random_adapter(base, work / f"{name}-adapter", chat_format)
    merge_lora.main(["--adapter", str(adapter), "--output", str(work / name)])
    return work / name


def check_prompts(ollama: Ollama, merged: Path, name: str) -> int:
    """How many chats Ollama renders or counts otherwise than transformers."""
    from transformers import AutoTokenizer

    tokenizer, wrong, counted = AutoTokenizer.from_pretrained(merged), 0, 0
    for chat in CHATS:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        count = len(tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids)
        rendered = ollama.chat(name, chat, _debug_render_only=True)["_debug_info"]["rendered_template"]
        # A random model may write bytes that are not UTF-8; then Ollama ends without a count.
        reported = ollama.chat(name, chat).get("prompt_eval_count")
        same = text.removeprefix(tokenizer.bos_token) == rendered and reported in (None, count)
        wrong, counted = wrong + (not same), counted + (reported is not None)
        print(f"{'same' if same else 'DIFFERS'}  {count} tokens here, {reported} in Ollama  {chat[-1]['content']}")
        if not same:
            print(f"  here {text!r}\n  Ollama {rendered!r}")
    if counted < len(CHATS) / 2:
        raise SystemExit(f"test-ollama: only {counted} of {len(CHATS)} prompts have a token count")
    return wrong


def check_answers(ollama: Ollama, merged: Path, name: str) -> int:
    """How many greedy answers differ although the prompt has as many tokens and the two tokens are no tie."""
    from engine import answers_of_transformers, gap_at_first_difference
    from transformers import AutoTokenizer

    tokenizer, wrong, compared = AutoTokenizer.from_pretrained(merged), 0, 0
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in CHATS]
    for chat, prompt, ids in zip(CHATS, prompts, answers_of_transformers(merged, prompts, LENGTH), strict=True):
        answer = ollama.chat(name, chat)
        ours, theirs = tokenizer.decode(ids, skip_special_tokens=True).strip(), answer["message"]["content"].strip()
        if answer.get("prompt_eval_count") != len(prompt):
            verdict = "split otherwise"
        elif ours == theirs:
            verdict, compared = "same", compared + 1
        else:
            its = [*tokenizer(theirs, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            gap = gap_at_first_difference(merged, prompt, ids, its)
            verdict, compared = f"{'tie' if gap < TIE else 'DIFFERS'} of {gap:.3f} nats", compared + 1
            wrong += gap >= TIE
        counts = f"{len(prompt)} tokens here, {answer.get('prompt_eval_count')} in Ollama"
        print(f"{verdict}  {counts}  {chat[-1]['content']}  {theirs!r}" + ("" if ours == theirs else f" not {ours!r}"))
    if compared < len(CHATS) / 2:
        raise SystemExit(f"test-ollama: only {compared} of {len(CHATS)} answers could be compared")
    return wrong


def main() -> None:
    binary = shutil.which("ollama")
    if binary is None:
        print("test-ollama: skipped, there is no ollama on PATH (https://ollama.com/download)")
        return
    import parts

    with tempfile.TemporaryDirectory(prefix="ollama-e2e-") as folder, serve(binary, Path(folder)) as ollama:
        llama = merged_folder(parts.tiny_llama31(), Path(folder), "llama31", "dolores")
        ollama.create("llama31", llama)
        wrong = check_prompts(ollama, llama, "llama31")
        smollm2 = merged_folder(parts.smollm2(), Path(folder), "smollm2", "chatml")
        ollama.create("smollm2", smollm2, "-q", "F32")
        wrong += check_answers(ollama, smollm2, "smollm2")
    if wrong:
        raise SystemExit(f"test-ollama: {wrong} of {2 * len(CHATS)} checks failed")
    print("test-ollama: prompts and answers are those of transformers")


if __name__ == "__main__":
    main()
