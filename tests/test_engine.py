"""The GGUF that a merge writes, run by llama.cpp and compared token by token with transformers."""

from pathlib import Path

import pytest
from engine import answers_of_transformers, gap_at_first_difference, llama_cpp, random_adapter, read_gguf
from transformers import AutoTokenizer

import merge_lora

pytestmark = pytest.mark.slow

LENGTH = 24  # maximum tokens of an answer
QUESTIONS = [
    "What is the capital of France?", "Name three colours.", "What is 2 + 2?", "Who wrote Hamlet?", "Name a fruit.",
    "Is the sky blue?", "What is the opposite of hot?", "Quelle est la capitale de l'Italie ?", "Dis bonjour.",
    "Nomme un animal.", "How many days are in a week?", "Translate 'chat' into English.",
]  # fmt: skip


@pytest.fixture(scope="module")
def merged(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 changed slightly by an adapter, in its own chat format: it still answers, and stops."""
    folder = tmp_path_factory.mktemp("engine")
    adapter = random_adapter(smollm2, folder / "adapter", "chatml")
    merge_lora.main(["--adapter", str(adapter), "--output", str(folder / "merged"), "--gguf", "BF16"])
    return folder / "merged"


def test_the_file_has_the_settings_of_the_base(merged):
    """RoPE, context, end token and vocabulary are right: a lost theta or end token raises no error anywhere."""
    keys, _ = read_gguf(merged / "dolores-v5-BF16.gguf")
    assert keys["general.architecture"] == "llama" and keys["general.name"] == "dolores-v5"
    assert keys["llama.rope.freq_base"] == 100000.0
    assert keys["llama.context_length"] == 8192
    assert keys["tokenizer.ggml.eos_token_id"] == 2 and not keys["tokenizer.ggml.add_bos_token"]
    assert keys["tokenizer.ggml.pre"] == "smollm"  # with a changed tokenizer.json, a default
    assert len(keys["tokenizer.ggml.tokens"]) == 49152
    assert keys["tokenizer.chat_template"] == (merged / "chat_template.jinja").read_text()
    assert "tool" not in keys["tokenizer.chat_template"]  # else Ollama might prefer it to the Modelfile's


def test_llama_cpp_answers_like_transformers(merged):
    tokenizer = AutoTokenizer.from_pretrained(merged)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in chats]
    theirs, _ = llama_cpp(merged / "dolores-v5-BF16.gguf", prompts, [], LENGTH)
    ended = [ids for ids, reason in theirs if reason == "stop"]
    assert len(ended) >= 4 and all(ids[-1] == 2 for ids in ended)  # most short answers stop with the end token
    answers = zip(prompts, answers_of_transformers(merged, prompts, LENGTH), theirs, strict=True)
    gaps = [gap_at_first_difference(merged, prompt, mine, its) for prompt, mine, (its, _) in answers if mine != its]
    # Allowed: near ties. llama.cpp rounds activations to bfloat16 too, where the weights are.
    assert len(gaps) <= 3 and all(gap < 0.05 for gap in gaps)
