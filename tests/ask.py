"""Put the same questions to several model folders, sampled as the Modelfile samples (temperature 0.7).

python tests/ask.py BEFORE AFTER "Qui es-tu ?" "Et l'oubli ?"
"""

import os
import sys


def answers(folder: str, questions: list[str], max_new_tokens: int = 80) -> list[str]:
    """The answers of a model folder, in the chat format of its chat_template.jinja; the same ones on every run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        # Tokens at once and not text first: encoding rendered text would add a second BOS.
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )
        set_seed(0)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, top_k=40)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        found.append(text if tokenizer.eos_token_id in output[0, -1:] else f"{text} …")  # cut, not ended
    return found


if __name__ == "__main__":
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folders = [argument for argument in sys.argv[1:] if os.path.isdir(argument)]
    questions = [argument for argument in sys.argv[1:] if argument not in folders]
    asked = [answers(folder, questions) for folder in folders]
    for i, question in enumerate(questions):
        print(f"\n{question}")
        for folder, given in zip(folders, asked, strict=True):
            print(f"\n--- {folder}\n{given[i]}")
