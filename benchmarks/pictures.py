#!/usr/bin/env python3
"""The README's pictures, made from real output.

    python benchmarks/pictures.py preview               # docs/preview.png: what --preview shows of train.chatml
    python benchmarks/pictures.py loss good RUN         # docs/loss_good.png: the loss curve that a run has written
    python benchmarks/pictures.py loss overfitted RUN

Each picture has a background of its own, so that it can be read on light and dark pages.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llama import LLAMA31_8B, ROOT

COLUMNS, LINES = 88, 24
INK, PAPER, TRAINED = "#1f2328", "#f6f8fa", "#aceebb"
ROW, WIDTH = 0.17, 0.602 * 9 / 72  # inches: a line, and a character of DejaVu Sans Mono in 9 points


def preview_text() -> str:
    """The first conversations of the first row in Llama 3.1's vocabulary, with trained tokens between ⟦ and ⟧."""
    import parts

    with tempfile.TemporaryDirectory() as folder:  # --preview needs no weights
        shutil.copytree(parts.llama31_tokenizer(), folder, dirs_exist_ok=True)
        Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA31_8B}))
        command = [sys.executable, "train_sft_dolores.py", "--model", folder, "--preview", "1"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return printed[printed.index("=== row 1") :]


def lines_of(text: str) -> list[list[tuple[str, bool]]]:
    """Text with ⟦ ⟧ → screen lines of (character, whether it is trained)."""
    lines: list[list[tuple[str, bool]]] = [[]]
    trained = False
    for character in text:
        if character in "⟦⟧":
            trained = character == "⟦"
        elif character == "\n":
            lines[-1] += [(" ", True)] if trained else []  # the end of a trained line shows too
            lines.append([])
        else:
            lines[-1].append((character, trained))
            if len(lines[-1]) > COLUMNS:  # wrap after the last blank
                cut = max(i for i, (seen, _) in enumerate(lines[-1]) if seen == " ") + 1
                lines.append(lines[-1][cut:])
                del lines[-2][cut:]
    return lines


def draw_preview(text: str, file: Path) -> None:
    """Draw `preview_text` as a terminal shows it: trained text on green."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.hinting"] = "none"  # so that every character has the same width
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    lines = lines_of(text)[:LINES]
    width, height = (COLUMNS + 4) * WIDTH, (len(lines) + 1) * ROW
    figure = pyplot.figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for number, line in enumerate(lines):
        y = (number + 0.5) * ROW
        for column, (_, trained) in enumerate(line):
            if trained:
                axes.add_patch(Rectangle(((column + 2) * WIDTH, y), WIDTH * 1.02, ROW, color=TRAINED, lw=0))
        shown = "".join(character for character, _ in line)
        axes.text(2 * WIDTH, y + ROW * 0.75, shown, family="DejaVu Sans Mono", size=9, color=INK, parse_math=False)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("preview")
    loss = kinds.add_parser("loss")
    loss.add_argument("name", choices=("good", "overfitted"))
    loss.add_argument("run", type=Path, help="the output folder of a run")
    args = parser.parse_args()
    if args.kind == "preview":
        draw_preview(preview_text(), ROOT / "docs" / "preview.png")
    else:
        shutil.copyfile(args.run / "loss.png", ROOT / "docs" / f"loss_{args.name}.png")


if __name__ == "__main__":
    main()
