"""wandb and TensorBoard, as mirrors of metrics.jsonl that a resumed run continues."""

from __future__ import annotations

import hashlib
import html
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distrain.config.registry import trackers
from distrain.run.media import Media, read_table
from distrain.run.metrics_file import MetricsFile
from distrain.training.callbacks.offline_runs import OfflineRuns
from distrain.training.callbacks.tracker import Row, Tracker, TrackerStart, artifact_name, media_in, numbers_of


@trackers.register("wandb")
class Wandb(Tracker):
    """Weights & Biases: one run, written by rank 0, the same one after every resume.

    wandb's own step is the line number in metrics.jsonl, which makes replaying safe: a line that the service has is not
    sent again. Offline, each start writes a folder of its own, with the rows that those of earlier starts lack.
    """

    name = "wandb"

    def __init__(self, start: TrackerStart):
        import wandb

        run, recipe, rows = start.run, start.recipe, start.rows
        self._folder = run
        folder = run.path / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "run-id"
        if not id_file.exists():
            id_file.write_text(hashlib.sha256(f"{run.path}\0{time.time()}".encode()).hexdigest()[:12])
        self._id = id_file.read_text().strip()
        offline = OfflineRuns(folder, self._id) if recipe.log.wandb == "offline" else None
        # a checkpoint without the mark was saved while something else was written, or nothing
        held = offline.cut(rows.kept if start.mark == self.mark() else 0) if offline is not None else 0
        self._run = wandb.init(
            dir=str(folder),
            id=self._id,
            name=recipe.name,
            project=recipe.log.project,
            mode="online" if offline is None else "offline",
            resume="allow",  # offline it is a note for the upload
            config=start.config,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if offline is not None:
            offline.begin(Path(self._run.dir).parent, held)
        self._next = self._run.step if offline is None else held

    def missing(self, rows: MetricsFile, history: dict[str, Any]) -> Iterable[tuple[int, Row]] | None:
        return enumerate(rows.last(rows.count - self._next), self._next)

    def mark(self) -> Any:
        return {"id": self._id}

    def write(self, index: int, row: Row) -> None:
        if index >= self._next:
            media = {name: self._shown(item, path) for name, item, path in media_in(self._folder, row)}
            self._run.log({"event": row["event"], "step": row["step"], **numbers_of(row), **media}, step=index)

    def _shown(self, item: Media, path: Path) -> Any:
        import wandb

        match item.kind:
            case "image":
                return wandb.Image(str(path), caption=item.caption or None)
            case "table":
                columns, rows = read_table(path)
                return wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)
            case _:
                caption = f"<p>{html.escape(item.caption)}</p>" if item.caption else ""
                return wandb.Html(f"{caption}<pre>{html.escape(path.read_text('utf-8'))}</pre>", inject=False)

    def finish(self, files: Mapping[str, Path]) -> None:
        import wandb

        for name, path in files.items():
            kind = "model" if name == "model" else "checkpoint"
            artifact = wandb.Artifact(artifact_name(self._folder, name), kind)
            artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
            self._run.log_artifact(artifact, aliases=[name])

    def close(self) -> None:
        self._run.finish()


@trackers.register("tensorboard")
class TensorBoard(Tracker):
    """TensorBoard event files, one for each attempt: it cuts off what was written after the checkpoint it resumes from.

    Without a checkpoint that says where that is, they are written anew from metrics.jsonl.
    """

    name = "tensorboard"

    def __init__(self, start: TrackerStart):
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._folder, step = start.run, start.run.path / "tensorboard", start.step
        self._goes_on = self._cut(step, start.mark)
        if not self._goes_on:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._suffix = f".from-{step}.{secrets.token_hex(4)}"
        self._writer = SummaryWriter(str(self._folder), filename_suffix=self._suffix)

    def _cut(self, step: int, marked: Any) -> bool:
        """Bring the files to what they were at the mark; returns whether that is possible."""
        if not isinstance(marked, dict) or type(marked.get("bytes")) is not int:
            return False
        last = self._folder / Path(str(marked.get("file"))).name
        if not last.is_file() or last.is_symlink() or not 0 <= marked["bytes"] <= last.stat().st_size:
            return False
        for other in self._folder.glob("events.*"):
            begun = re.search(r"\.from-([0-9]+)\.[0-9a-f]+$", other.name)
            if other != last and (begun is None or int(begun[1]) >= step):
                other.unlink()
        os.truncate(last, marked["bytes"])
        return True

    def missing(self, rows: MetricsFile, history: dict[str, Any]) -> Iterable[tuple[int, Row]] | None:
        if not self._goes_on:
            return None
        there, finals = history.get("events", ()), history.get("finals", ())
        lacks = (
            row["step"] not in finals
            if row["event"] == "final"
            else row["step"] == rows.step and row["event"] not in there
            for row in rows.recent
        )
        return [(0, row) for row, lacking in zip(rows.recent, lacks, strict=True) if lacking]

    def mark(self) -> Any:
        self._writer.flush()
        (file,) = self._folder.glob(f"events.*{self._suffix}")
        return {"file": file.name, "bytes": file.stat().st_size}

    def write(self, index: int, row: Row) -> None:
        for name, value in numbers_of(row).items():
            self._writer.add_scalar(name, value, row["step"])
        for name, item, path in media_in(self._run, row):
            self._show(name, item, path, row["step"])

    def _show(self, name: str, item: Media, path: Path, step: int) -> None:
        if item.kind == "image":
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                self._writer.add_image(name, np.asarray(picture.convert("RGBA")), step, dataformats="HWC")
            return
        if item.kind == "table":
            columns, rows = read_table(path)
            lines = [_markdown(columns), "|" + "---|" * len(columns), *map(_markdown, rows)]
        else:
            lines = [f"    {line}" for line in path.read_text("utf-8").split("\n")]
        caption = [item.caption, ""] if item.caption else []
        self._writer.add_text(name, "\n".join([*caption, *lines]), step)

    def close(self) -> None:
        self._writer.close()


def _markdown(cells: Iterable[Any]) -> str:
    """Return a row of a table in Markdown."""
    texts = ("" if cell is None else str(cell) for cell in cells)
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"
