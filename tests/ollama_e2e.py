"""`make test-ollama`: imports the merged SmolLM2 with `ollama create`, chats with it and compares with transformers.

    python tests/ollama_e2e.py

Needs an `ollama` binary on PATH; without one it prints that and succeeds. It starts its own server on a free port
with its own model folder; the user's models are not touched.
"""

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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "What is 2 + 2?",
    "Dis bonjour.",
    "Name a planet.",
]
LENGTH = 24
HISTORY = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Hello, Ada."}]


def ask(port: int, path: str, content: dict | None = None) -> dict:
    data = None if content is None else json.dumps(content).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=300) as answer:
        return json.load(answer)


def serve(binary: str, models: Path) -> tuple[subprocess.Popen, int, dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(models)}
    log = open(models.parent / "ollama.log", "w")  # noqa: SIM115 (it lives as long as the server)
    server = subprocess.Popen([binary, "serve"], env=environment, stdout=log, stderr=log)
    for _ in range(120):
        try:
            ask(port, "/api/version")
            return server, port, environment
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    server.kill()
    raise SystemExit(f"ollama serve did not come up: {(models.parent / 'ollama.log').read_text()[-2000:]}")


def merged_folder(work: Path) -> Path:
    import parts
    from engine import random_adapter

    import merge_lora

    adapter = random_adapter(parts.smollm2(), work / "adapter", "chatml")
    merge_lora.main(["--adapter", str(adapter), "--output", str(work / "merged")])
    return work / "merged"


def main() -> None:
    binary = shutil.which("ollama")
    if binary is None:
        print("test-ollama: skipped, there is no ollama on PATH (https://ollama.com/download)")
        return
    from engine import answers_of_transformers
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="ollama-e2e-") as folder:
        work = Path(folder)
        merged = merged_folder(work)
        server, port, environment = serve(binary, work / "models")
        try:
            create = [binary, "create", "dolores-e2e", "-f", str(merged / "Modelfile")]
            subprocess.run(create, env=environment, check=True)
            tokenizer = AutoTokenizer.from_pretrained(merged)
            chats = [[*before, {"role": "user", "content": q}] for q in QUESTIONS for before in ([], HISTORY)]
            prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in chats]
            wrong = 0
            for chat, prompt, ids in zip(chats, prompts, answers_of_transformers(merged, prompts, LENGTH), strict=True):
                options = {"temperature": 0, "num_predict": LENGTH}
                request = {"model": "dolores-e2e", "messages": chat, "stream": False, "options": options}
                answer = ask(port, "/api/chat", request)
                ours, theirs = (
                    tokenizer.decode(ids, skip_special_tokens=True).strip(),
                    answer["message"]["content"].strip(),
                )
                same = ours == theirs and answer.get("prompt_eval_count") == len(prompt)
                wrong += not same
                counts = f"{len(prompt)} tokens here, {answer.get('prompt_eval_count')} in Ollama"
                print(
                    f"{'same' if same else 'DIFFERS'}  {chat[-1]['content']}  {theirs!r}  ({counts})"
                    + ("" if same else f" not {ours!r}")
                )
        finally:
            server.terminate()
            server.wait()
    if wrong:
        raise SystemExit(f"test-ollama: {wrong} of {len(chats)} answers differ")
    print(f"test-ollama: {len(chats)} answers are those of transformers")


if __name__ == "__main__":
    main()
