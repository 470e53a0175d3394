"""Runs that are submitted to the cluster: the digits recipe with a model whose pace a test sets."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm_cluster import Cluster, wait_until

HERE = Path(__file__).parent
DISTRAIN = str(Path(sys.executable).parent / "distrain")
STEPS = 60

RECIPE = """
name: paced
task: classification
data: {{name: digits, split: [0.7, 0.15, 0.15], stratify: true}}
model: {{name: "paced.py:Paced", pace: {folder}/pace}}
optim: {{name: adamw, lr: 3.0e-3, weight_decay: 0.05, clip_norm: 1.0}}
schedule: {{name: cosine, warmup: 5%}}
batch: {{global: 64}}
train: {{steps: {steps}}}
eval: {{every: 20 steps, metrics: [accuracy], best: accuracy}}
checkpoint: {{every: 10 steps, keep: 2}}
log: {{every: 1 steps, wandb: {wandb}}}
"""


class Project:
    """A folder with a recipe and a model of its own, as a user has it, from which runs are submitted."""

    def __init__(self, cluster: Cluster, folder: Path, *, wandb: str = "off"):
        """`wandb`: off or offline."""
        self.cluster = cluster
        self.folder = folder
        self.recipe = folder / "paced.yaml"
        folder.mkdir(exist_ok=True)
        shutil.copy(HERE / "paced.py", folder)
        self.recipe.write_text(RECIPE.format(folder=folder, steps=STEPS, wandb=wandb))

    def pace(self, seconds: float, *nodes: str) -> None:
        """Set how long a step waits, on these nodes or on all."""
        for name in [f"pace.{node}" for node in nodes] or ["pace.all"]:
            (self.folder / ".pace").write_text(str(seconds))
            (self.folder / ".pace").rename(self.folder / name)

    def distrain(self, *arguments: str | Path, **options: Any) -> str:
        """Run a command of distrain on the login node, in this folder; returns what it printed."""
        return self.cluster.run(DISTRAIN, *arguments, cwd=self.folder, **options).stdout

    def submit(self, *arguments: str | Path, nodes: int = 2, each: int = 1, time: str = "10", **options: Any) -> str:
        """Submit the recipe, or the run whose folder comes first, `each` processes a node; returns the job's number."""
        sizes = ("--nodes", str(nodes), "--processes-per-node", str(each), "--time", time, "--sbatch=--exclusive")
        named = arguments if isinstance(next(iter(arguments), None), Path) else (self.recipe, *arguments)
        said = self.distrain("submit", *named, *sizes, **options)
        return said.split("job ", 1)[1].split(":", 1)[0]


@dataclass(frozen=True)
class Uninterrupted:
    """A run that was never stopped, and what was seen of it."""

    project: Project
    run: Run
    job: str
    canaries: dict[str, str]
    """What was in the environment of whoever submitted it, and is nobody's business."""
    environments: set[bytes]
    """The environment of each process of the job."""


class Run:
    """What a run's folder says."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl."""
        try:
            lines = (self.path / "metrics.jsonl").read_text().split("\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[:-1]]

    def step(self) -> int:
        """Return the last step that was logged."""
        return max((row["step"] for row in self.rows()), default=0)

    def wait_for_step(self, step: int, timeout_s: float = 90) -> None:
        """Wait until the run has come so far."""
        try:
            wait_until(lambda: self.step() >= step, f"step {step} of {self.path}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it has come to {self.step()}.\n{self.log()}") from None

    def wait_for_checkpoint(self, step: int, timeout_s: float = 60) -> None:
        """Wait until there is a checkpoint of that step or a later one."""
        wait_until(lambda: max(self.checkpoints(), default=0) >= step, f"a checkpoint of step {step}", timeout_s)

    def checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints that are there."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.path.glob("checkpoints/step-*"))

    def log(self) -> str:
        """Return what the batch script and the processes printed."""
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.path.glob("**/slurm-*.log")))

    def weights(self) -> str:
        """Return the hash of the exported model."""
        return hashlib.sha256((self.path / "export" / "model.safetensors").read_bytes()).hexdigest()

    def attempts(self) -> list[dict[str, Any]]:
        """Return one row for each start."""
        rows = [json.loads(line) for line in (self.path / "attempts.jsonl").read_text().splitlines()]
        return [row for row in rows if "event" not in row]

    def numbers(self) -> list[tuple[str, int, Any]]:
        """Return the numbers of every row but those of checkpoints, of which an interruption makes one more."""
        kept = [
            (row["event"], row["step"], row.get("loss"), row.get("accuracy"))
            for row in self.rows()
            if row["event"] != "checkpoint"
        ]
        return sorted(kept, key=lambda row: (row[1], row[0]))

    def assert_same_as(self, other: Run) -> None:
        """Every number that the other run logged, each once, and the same weights to the bit."""
        self.assert_rows_once()
        assert self.numbers() == other.numbers()
        assert self.weights() == other.weights()

    def assert_rows_once(self) -> None:
        """Every step has one row of training."""
        counts = Counter((row["event"], row["step"]) for row in self.rows())
        assert set(counts.values()) == {1}, {key: count for key, count in counts.items() if count > 1}
        assert [step for event, step in counts if event == "train"] == list(range(1, STEPS + 1))
