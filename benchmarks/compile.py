"""How fast a GPT trains, and in how much memory: distrain, compiled and not, against bare loops of the same model.

    python benchmarks/compile.py [--rounds 5] [--quick] [--gpu] [--nanogpt MODEL.py] [--save FILE]

Every subject trains the same architecture (distrain's `gpt`, tied, without bias) on the same random tokens with a fused
AdamW and the gradient clipped to norm 1: a bare loop with the model compiled, as most scripts have it; a bare loop with
the loss compiled too, which is the most that PyTorch gives by hand; distrain as it is, and with `train.compile: true`,
both with everything on. With `--nanogpt` so does nanoGPT's own model, from its file model.py. On a GPU the forward pass
is in bf16 and the sizes are GPT-2's of 124M and 350M; on a CPU it is in fp32 and the model is small, with a vocabulary
that is large beside it, as those of language models are. Each subject is a process that lives through all rounds, as
compiling takes longer than they do; in a round each makes a few steps, while the others wait. Memory is what the device
held at most in a round (a CPU: the largest resident set of the process).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NoReturn

from turns import Table, options_of


@dataclass(frozen=True)
class Size:
    """A model and its micro-batch."""

    layers: int
    width: int
    heads: int
    batch: int
    seq: int
    vocabulary: int
    steps: int
    """In a turn."""
    warm: int


ON_CPU = {"a small GPT": Size(2, 64, 2, 4, 256, 32768, steps=2, warm=2)}
QUICK = {"a tiny GPT": Size(1, 16, 1, 2, 64, 1024, steps=1, warm=1)}
ON_GPU = {
    "GPT-2 124M, 12 x 1024 tokens": Size(12, 768, 12, 12, 1024, 50304, steps=20, warm=8),
    "GPT-2 350M, 4 x 1024 tokens": Size(24, 1024, 16, 4, 1024, 50304, steps=20, warm=8),
}
SUBJECTS = ("bare", "bare, loss compiled", "distrain", "distrain, compiled")


class Turn:
    """In a measured process: waits for its turns between steps, and reports each."""

    def __init__(self, size: Size, gpu: bool):
        self.size, self.gpu = size, gpu
        self.report = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what is printed on the way is no report
        self.count = self.left = 0
        self.began = 0.0

    def before_step(self) -> None:
        """Call it before each step; it ends the process when no turn is left."""
        self.count += 1
        if self.count <= self.size.warm:
            return
        if self.left == 0:
            self._sync()
            seconds = time.perf_counter() - self.began
            tokens = self.size.batch * self.size.seq * self.size.steps
            self._say({"tokens_per_s": tokens / seconds, "peak_mib": self._peak() / 2**20})
            if not sys.stdin.readline():
                os._exit(0)
            self._sync()
            self._forget_peak()
            self.began, self.left = time.perf_counter(), self.size.steps
        self.left -= 1

    def _say(self, what: dict[str, float]) -> None:
        self.report.write(json.dumps(what) + "\n")
        self.report.flush()

    def _sync(self) -> None:
        if self.gpu:
            import torch

            torch.cuda.synchronize()

    def _peak(self) -> float:
        if self.gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def _forget_peak(self) -> None:
        if self.gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")


def _draw(size: Size, rows: int) -> Any:
    import numpy as np

    draw = np.random.default_rng(0)  # a few tokens are frequent, as in text
    return np.minimum(draw.geometric(16 / size.vocabulary, (rows, size.seq + 1)), size.vocabulary - 1).astype(np.int64)


def run_bare(size: Size, gpu: bool, *, loss_compiled: bool, nanogpt: Path | None) -> NoReturn:
    """PyTorch by hand."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    device = "cuda" if gpu else "cpu"
    if nanogpt is not None:
        spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sizes = {"n_layer": size.layers, "n_head": size.heads, "n_embd": size.width, "block_size": size.seq}
        config = module.GPTConfig(**sizes, bias=False, vocab_size=size.vocabulary, dropout=0.0)
        model = module.GPT(config).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    else:
        from distrain.networks.gpt import GPT

        model = GPT(size.vocabulary, size.seq, n_layer=size.layers, n_head=size.heads, d_model=size.width).to(device)
        decayed = [each for each in model.parameters() if each.dim() > 1]
        others = [each for each in model.parameters() if each.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)

    def loss_of(run: Any, x: Any, y: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=gpu):
            if nanogpt is not None:
                return run(x, y)[1]
            return functional.cross_entropy(run(x).flatten(0, 1), y.flatten())

    compute: Callable[[Any, Any], Any]
    if loss_compiled:
        compute = torch.compile(lambda x, y: loss_of(model, x, y))
    else:
        compiled = torch.compile(model)
        compute = lambda x, y: loss_of(compiled, x, y)  # noqa: E731
    rows = torch.from_numpy(_draw(size, 64 * size.batch))
    turn, step = Turn(size, gpu), 0
    while True:
        turn.before_step()
        part = rows[torch.arange(step * size.batch, (step + 1) * size.batch) % len(rows)]
        x, y = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        if gpu:
            x, y = (each.pin_memory().to(device, non_blocking=True) for each in (x, y))
        loss = compute(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            loss.item()


class Rows:
    """The same tokens as a data set of distrain's."""

    def __init__(self, split: str, size: list[int]):
        self.size = Size(*size)
        self.rows = _draw(self.size, 64 * self.size.batch if split == "train" else 1)
        self.meta = {"vocab_size": self.size.vocabulary, "tokens_per_sample": self.size.seq}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.rows[index]
        return row[:-1], row[1:]


def run_distrain(size: Size, gpu: bool, *, compiled: bool) -> NoReturn:
    """distrain with everything on, as `distrain train` starts it."""
    from distrain import Callback
    from distrain.launchers import work

    turn = Turn(size, gpu)

    class Ticks(Callback):
        asks = False

        def on_step_start(self, step: int) -> None:
            turn.before_step()

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            "name: compiled\ntask: language_modeling\n"
            f'data: {{name: "{Path(__file__).resolve()}:Rows", size: {list(astuple(size))}}}\n'
            f"model: {{name: gpt, seq_len: {size.seq}, n_layer: {size.layers}, n_head: {size.heads}, "
            f"d_model: {size.width}}}\n"
            "optim: {name: adamw, lr: 6.0e-4, weight_decay: 0.1, betas: [0.9, 0.95], clip_norm: 1.0}\n"
            f"batch: {{global: {size.batch}, micro: {size.batch}}}\n"
            f"train: {{steps: 1_000_000, precision: {'bf16' if gpu else 'fp32'}, compile: {str(compiled).lower()}}}\n"
            "eval: {every: null}\ncheckpoint: {every: null, async: false}\nlog: {every: 10 steps}\n"
        )
        with contextlib.redirect_stdout(sys.stderr):
            status = work(str(recipe), run_dir=str(Path(folder) / "run"), callbacks=[Ticks()])
    raise SystemExit(f"distrain ended with status {status}")


# --------------------------------------------------------------------------------------------------------------------
# Running them


class Subject:
    """A measured process, as the one that measures sees it."""

    def __init__(self, name: str, size: Size, arguments: list[str], log: Path, gpu: bool):
        self.name, self.log = name, log
        self.peaks: list[float] = []
        command = [sys.executable, __file__, "--subject", name, "--size", json.dumps(astuple(size)), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )

    def answer(self) -> dict[str, float]:
        """Return what it reports next."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        found: dict[str, float] = json.loads(line)
        return found

    def measure(self) -> float:
        """Give it a turn; returns its tokens per second."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found = self.answer()
        self.peaks.append(found["peak_mib"])
        return found["tokens_per_s"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Measure and print the tables; or, with --subject, be one of the measured processes."""
    parser = options_of(__doc__)
    parser.add_argument("--nanogpt", type=Path, help="nanoGPT's model.py, to measure it too")
    parser.add_argument("--subject", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        _be(options.subject, Size(*json.loads(options.size)), options)
    more = [*(["--gpu"] if options.gpu else []), *(["--nanogpt", str(options.nanogpt)] if options.nanogpt else [])]
    names = [*SUBJECTS, *(["nanoGPT"] if options.nanogpt else [])]
    base = names[-1] if options.nanogpt else "bare, loss compiled"
    rounds = 1 if options.quick else options.rounds
    speed = Table("Training a GPT", "tokens/s", lower_is_better=False)
    memory = Table("", "MiB at most")
    for title, size in (QUICK if options.quick else ON_GPU if options.gpu else ON_CPU).items():
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            subjects = [
                Subject(name, size, more, Path(folder) / f"{at}.log", options.gpu) for at, name in enumerate(names)
            ]
            for each in subjects:
                stack.callback(each.end)
            for each in subjects:
                each.answer()  # warm
            goal = 1.05 if options.nanogpt else 1.0
            goals = {"distrain, compiled": goal} if options.gpu else None
            measured = {each.name: each.measure for each in subjects}
            speed.measure(measured, base=base, rounds=rounds, title=title, goals=goals)
            goals = {"distrain, compiled": 1.0} if options.gpu else None
            memory.add({each.name: each.peaks for each in subjects}, base=base, title=title, goals=goals)
    speed.lines += memory.lines
    speed.save(options.save)


def _be(name: str, size: Size, options: Any) -> NoReturn:
    import torch

    torch.set_num_threads(1)
    gpu = options.gpu and torch.cuda.is_available()  # a dry run of --gpu --quick needs none
    if name.startswith("distrain"):
        run_distrain(size, gpu, compiled="compiled" in name)
    nanogpt = options.nanogpt if name == "nanoGPT" else None
    run_bare(size, gpu, loss_compiled="loss compiled" in name, nanogpt=nanogpt)


if __name__ == "__main__":
    main()
