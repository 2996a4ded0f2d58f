"""Commands, flags, links and files in the README and docs/ exist; the versions of the tools agree."""

import re
import shlex

import pytest
from runs import ROOT

import merge_lora
import train_sft_dolores as sft

PAGES = [ROOT / "README.md", ROOT / "README.fr.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in dict.fromkeys(re.findall(r"```bash\n(.*?)```", README, re.S))  # both languages have the same blocks
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(python3|torchrun|accelerate) .*\.py", line)
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command):
    script = next(word for word in command if word.endswith(".py"))
    parse = {"train_sft_dolores.py": sft.parse_args, "merge_lora.py": merge_lora.parse_args}[script]
    parse(command[command.index(script) + 1 :])
    if command[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(command[1:])


def test_the_documented_command_is_the_defaults():
    (documented,) = [command for command in COMMANDS if "--lora-target-modules" in command]
    ours, defaults = vars(sft.parse_args(documented[2:])), vars(sft.parse_args([]))
    assert ours == {**defaults, "input_format": "chatml"}  # what auto, the default, finds in train.chatml


def test_every_flag_in_the_readme_exists(capsys):
    for parse in (sft.parse_args, merge_lora.parse_args):
        with pytest.raises(SystemExit):
            parse(["--help"])
    flag, shown = re.compile(r"--[a-z][a-z0-9-]+"), capsys.readouterr().out
    others = {"--modelfile", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port",
              "--num", "--enable-lora", "--index-url"}  # Ollama's, torchrun's, accelerate's, vLLM's, pip's  # fmt: skip
    assert set(flag.findall(README)) - others <= set(flag.findall(shown))


def test_the_reference_shows_the_help():
    """The screen of `--help` is checked against the program in test_screens.py."""
    shown = (ROOT / "tests" / "screens" / "help.txt").read_text()
    assert f"```\n{shown}```" in (ROOT / "docs" / "reference.md").read_text(), "copy tests/screens/help.txt into it"


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https://)([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}  # GitHub's
                assert heading in anchors, f"{page.name}: {link}"


def test_both_languages_show_the_same_code():
    english, french = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.fr.md"))
    blocks, headings = re.compile(r"^```.*?^```$", re.M | re.S), re.compile(r"^#+ ", re.M)
    assert blocks.findall(english) and blocks.findall(french) == blocks.findall(english)
    assert headings.findall(blocks.sub("", french)) == headings.findall(blocks.sub("", english))
    assert "](README.fr.md)" in english and "](README.md)" in french


def test_files_and_targets_in_the_readme_exist():
    for name in ("train.chatml", "Modelfile", "requirements.txt", "LICENSE"):
        assert (ROOT / name).is_file()
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.M))
    assert targets and all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)


def test_tools_have_one_version():
    """pre-commit runs the ruff of requirements-dev.txt; the hosted workflow pins its actions by commit."""
    (ruff,) = re.findall(r"^ruff==(.+)$", (ROOT / "requirements-dev.txt").read_text(), re.M)
    (hook,) = re.findall(r"ruff-pre-commit\n +rev: v(.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.M)
    assert hook == ruff
    used = re.findall(r"uses: (\S+)", (ROOT / ".github/workflows/tests.yml").read_text())
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used)
