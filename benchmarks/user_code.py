"""How many lines of user code a training takes: here, with Lightning, and with the Trainer of transformers or TRL.

    python benchmarks/user_code.py [--run DISTRAIN|LIGHTNING|TRAINER ...] [--write]

Counted are lines of benchmarks/user_code/SHAPE/ that are neither blank, comments nor docstrings, as ruff formats them
with 120 columns; of a recipe, those of the YAML. What all of them share, networks and data sets, is in parts.py and not
counted. `--run` trains each shape in an empty folder to see that the scripts do what they say; Lightning is found by
PYTHONPATH where it is not installed. `--write` replaces the table in docs/python.md.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "user_code"
PAGE = ROOT / "docs" / "python.md"
MARKS = ("<!-- user code: made by benchmarks/user_code.py -->", "<!-- end -->")
SHAPES = {
    "own_model": "own model, own data",
    "images": "fine-tuning on images",
    "lora": "causal LM with LoRA",
    "dpo": "DPO",
    "contrastive": "contrastive, over the global batch",
    "distillation": "distillation",
    "vae": "VAE",
    "sweep": "search over learning rates",
}
WAYS = {
    "distrain": ("with_distrain.py", "recipe.yaml"),
    "lightning": ("with_lightning.py",),
    "trainer": ("with_trainer.py",),
}
SEARCH = ["--search", "2", "--array", "optim.lr=1e-4..1e-1:log"]
"""Of `distrain sweep recipe.yaml`: one line more, in the shell."""


def lines(path: Path) -> int:
    """Return how many lines hold code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return sum(1 for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    without = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in without:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def counted(shape: str, way: str) -> int | None:
    """Return the lines of a shape; None where there is no script."""
    files = [FOLDER / shape / name for name in WAYS[way]]
    there = [lines(path) for path in files if path.exists()]
    return sum(there) + (shape == "sweep" and way == "distrain") if there else None


def table() -> str:
    """Return the table of docs/python.md."""
    rows = ["| training | distrain | Lightning | transformers' Trainer, TRL |", "|---|---|---|---|"]
    for shape, title in SHAPES.items():
        found = (counted(shape, way) for way in WAYS)
        rows.append(f"| {title} | " + " | ".join("–" if each is None else str(each) for each in found) + " |")
    return "\n".join(rows)


def on_page() -> str:
    """Return docs/python.md with the table as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}"


def prepare(folder: Path) -> None:
    """Write the data and weights that the scripts read."""
    sys.path[:0] = [str(ROOT / "recipes" / "prepare"), str(FOLDER)]
    import digits_folder
    import number_chats
    import parts
    import small_llama
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    prepared = folder / "prepared"
    prepared.mkdir()
    digits_folder.write(prepared / "images")
    save_file(resnet18(num_classes=5).state_dict(), prepared / "resnet18.safetensors")
    torch.save(parts.Net(width=128).state_dict(), prepared / "teacher.pt")
    small_llama.write(prepared / "llm")
    words = [number_chats.english(number) for number in range(2000)]
    for name, part in (("train", words[:1600]), ("test", words[1600:])):
        (prepared / "llm" / f"{name}.txt").write_text("\n".join(part))
    pairs = ({"prompt": f"{n} + {n}?", "chosen": f"{2 * n}", "rejected": f"Maybe {2 * n}."} for n in range(64))
    (prepared / "llm" / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def run(folder: Path, shape: str, way: str) -> str:
    """Run a shape's script in a folder with its data; returns how that went."""
    script = FOLDER / shape / WAYS[way][0]
    if counted(shape, way) is None:
        return "no script"
    arguments = [str(script)]
    if not script.exists():
        text = (FOLDER / shape / "recipe.yaml").read_text()
        (folder / f"{shape}.yaml").write_text(text)
        command = ["train"] if shape != "sweep" else ["sweep"]
        arguments = ["-m", "distrain", *command, f"{shape}.yaml", *(SEARCH if shape == "sweep" else [])]
    path = os.pathsep.join([str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")])
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    took = f"{time.perf_counter() - began:.0f} s"
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return f"{'runs' if done.returncode == 0 else 'fails'} ({took}): {said[-1] if said else ''}"


def main() -> None:
    print(table())
    arguments = sys.argv[1:]
    if "--write" in arguments:
        PAGE.write_text(on_page(), encoding="utf-8")
    if "--run" in arguments:
        wanted = [each.lower() for each in arguments if re.fullmatch("|".join(WAYS), each.lower())] or list(WAYS)
        shapes = [each for each in arguments if each in SHAPES] or list(SHAPES)
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            for shape in shapes:
                for way in wanted:
                    print(f"{shape} with {way}: {run(Path(folder), shape, way)}", flush=True)


if __name__ == "__main__":
    main()
