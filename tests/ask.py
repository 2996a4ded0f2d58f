"""Put one question to each of several model folders.

python tests/ask.py BEFORE AFTER "Qui es-tu ?"
"""

import sys


def answer(folder: str, question: str, max_new_tokens: int = 120) -> str:
    """The greedy answer of a model folder, in the chat format of its chat_template.jinja."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    # Tokens at once and not text first: encoding rendered text would add a second BOS.
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    *folders, question = sys.argv[1:]
    print(f"\n{question}")
    for folder in folders:
        print(f"\n--- {folder}\n{answer(folder, question)}", flush=True)
