"""What the input costs: images from memory, JPEG files, and tokens from a map, each beside its physical limit.

    python benchmarks/input.py [--part images jpeg tokens] [--rounds 7] [--quick] [--save FILE]

`images`: 32 × 32 bytes in memory, one thread, per second of CPU time, which other programs disturb less.

    copying           rows of the uint8 array by index, and no more: the limit
    v2, whole batches RandomCrop(32, padding 4), RandomHorizontalFlip, ToDtype(float32), Normalize of torchvision v2 on
                      whole batches: one crop and one flip for a whole batch, which is not the same augmentation
    v2, samples       the same transforms of v2 on one image after the other, and torch.stack
    distrain          build_loader with these transforms, each image with its own crop and flip
    distrain, bytes   the same where the last two are left to the device that the batches are for

`jpeg`: files of 500 × 375 in the page cache, two processes, images per second of CPU time of these and of the process
that receives. The peers crop and flip each image with v2 and stack them, in torch's DataLoader.

    decoding, *       each of two processes decodes its half of the files with Pillow or torchvision, and no more
    DataLoader        torchvision's ImageFolder, which decodes with Pillow: RandomCrop(224), RandomHorizontalFlip, bytes
    distrain, *       build_loader with the same transforms, data.workers=2, decoder pil or torchvision; bytes where the
                      device makes the floats and turns the channels to the front, floats where the loader processes do

`tokens`: rows of 1024 uint16 tokens from a memory map in the page cache, million tokens per second of CPU time.

    rows copied       NumPy copies each row from the map (2 bytes a token)
    nanoGPT           as its get_batch does: inputs and targets row by row, int64 (16 bytes a token)
    distrain          what training gets, inputs and targets: from one map, and from 64
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from turns import Table, options_of

from distrain.config import DataSection, Recipe
from distrain.data import build_loader, build_transform
from distrain.datasets.base import AnySource, DataRequest, TensorSource
from distrain.datasets.images import image_folder
from distrain.datasets.order import SampleOrder
from distrain.datasets.text import TokenRows

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
FLOATS = [{"name": "ToDtype", "dtype": "float32", "scale": True}, {"name": "Normalize", "mean": MEAN, "std": STD}]
FLIP = {"name": "RandomHorizontalFlip"}
GOAL = 0.9
WORKERS = 2


def loader(
    source: AnySource, transforms: list[dict[str, Any]], batch: int, workers: int = 0, *, bytes_left: bool = False
) -> Iterator[Any]:
    """Return the endless steps of one micro-batch that `build_loader` gives for a recipe with these transforms."""
    recipe = Recipe.model_validate(
        {
            "name": "input", "task": "classification", "model": "resnet18", "batch": {"global": batch},
            "data": {"name": "cifar10", "transforms": {"train": transforms}, "workers": workers}, "train": {"steps": 1},
        }
    )  # fmt: skip
    transform = build_transform(recipe, "train")
    if bytes_left:
        transform.leave_bytes()
    order = SampleOrder(len(source), recipe.seed)  # type: ignore[arg-type]
    return build_loader(source, order, recipe=recipe, rank=0, world_size=1, micro_batch_size=batch, transform=transform)


def cpu_rate(work: Callable[[], Any], amount: float, seconds: float) -> Callable[[], float]:
    """Return a function that measures amounts per second of CPU time of `work`, repeated for about `seconds`."""

    def measure() -> float:
        work()
        count, took, start = 0, 0.0, time.process_time()
        while count == 0 or took < seconds:
            work()
            count, took = count + 1, time.process_time() - start
        return count * amount / took

    return measure


# --------------------------------------------------------------------------------------------------------------------
# Images in memory


def images(table: Table, rounds: int, seconds: float) -> None:
    """Add the rows of images in memory."""
    batch, generator = 256, torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    source = TensorSource(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    chosen = torch.randint(0, len(pixels), (batch,), generator=generator)
    items = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    composed = v2.Compose([*items, v2.Normalize(MEAN, STD)])
    transforms = [{"name": "RandomCrop", "size": 32, "padding": 4}, FLIP, *FLOATS]
    floats, left = loader(source, transforms, batch), loader(source, transforms, batch, bytes_left=True)
    subjects: dict[str, tuple[Callable[[], Any], int]] = {
        "copying": (lambda: pixels.index_select(0, chosen), batch),
        "v2, whole batches": (lambda: composed(pixels.index_select(0, chosen)), batch),
        "v2, samples": (lambda: torch.stack([composed(pixels[index]) for index in chosen[:32].tolist()]), 32),
        "distrain": (lambda: next(floats), batch),
        "distrain, bytes": (lambda: next(left), batch),
    }
    table.measure(
        {name: cpu_rate(work, amount, seconds) for name, (work, amount) in subjects.items()},
        base="v2, whole batches",
        rounds=rounds,
        title="Images of 32 × 32 in memory, images per CPU second, one thread",
        goals={"distrain": GOAL},
    )


# --------------------------------------------------------------------------------------------------------------------
# JPEG files


def write_photos(folder: Path, count: int) -> list[Path]:
    """Write JPEG files with the smooth shapes and the grain of photographs, in two classes."""
    random, paths = np.random.default_rng(0), []
    rows, columns = np.mgrid[0:375, 0:500]
    for number in range(count):
        waves = random.uniform(0, 0.1, (3, 6, 2)), random.uniform(0, 6, (3, 6))
        shapes = [
            sum(np.sin(columns * x + rows * y + phase) for (x, y), phase in zip(*channel, strict=True))
            for channel in zip(*waves, strict=True)
        ]
        picture = np.stack(shapes, -1) * 20 + 128 + random.normal(0, 8, (375, 500, 3))
        path = folder / "ab"[number % 2] / f"{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def decode_pil(path: Path) -> Any:
    """Decode a file with Pillow, which keeps the pixels to itself."""
    with Image.open(path) as image:
        image.load()
        return image


def decode_torchvision(path: Path) -> Any:
    """Decode a file with torchvision."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    return decode_jpeg(read_file(str(path)), ImageReadMode.RGB)


def _decode_all(decode: Callable[[Path], Any], paths: list[Path], ready: Any, took: Any) -> None:
    torch.set_num_threads(1)
    decode(paths[0])
    ready.wait()
    began = time.process_time()
    for path in paths:
        decode(path)
    took.put(time.process_time() - began)


def decoding(decode: Callable[[Path], Any], paths: list[Path]) -> Callable[[], float]:
    """Return a function that measures how many images two processes decode in a second of their CPU time."""

    def measure() -> float:
        context = multiprocessing.get_context("fork")
        ready, took = context.Barrier(WORKERS), context.Queue()
        parts = [paths[worker::WORKERS] for worker in range(WORKERS)]
        processes = [context.Process(target=_decode_all, args=(decode, part, ready, took)) for part in parts]
        for process in processes:
            process.start()
        seconds = sum(took.get() for _ in processes)
        for process in processes:
            process.join()
        return len(paths) / seconds

    return measure


def cpu_s() -> float:
    """Return the seconds of CPU time that this process and its children have taken."""
    clocks = [~process.pid << 3 | 2 for process in multiprocessing.active_children() if process.pid is not None]
    return time.process_time() + sum(map(time.clock_gettime, clocks))  # numbered as clock_getcpuclockid(3) does


def steady(begin: Callable[[], Iterator[Any]], batch: int, batches: int) -> Callable[[], float]:
    """Return a function that measures images per second of CPU time of an iterator of batches, once it runs."""

    def measure() -> float:
        iterator = begin()
        ahead = 6 * WORKERS  # until the processes run and have the memory that they use again and again
        for _ in range(ahead):
            next(iterator)
        began = cpu_s()
        for _ in range(batches):
            next(iterator)
        took = cpu_s() - began
        del iterator
        return batches * batch / took

    return measure


def jpeg(table: Table, rounds: int, count: int, batch: int) -> None:
    """Add the rows of JPEG files."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    crop = {"name": "RandomCrop", "size": 224}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), count)
        sources = {
            decoder: image_folder(
                DataRequest(DataSection(name="image_folder", path=folder, split=[0.9, 0.1]), "classification", 0),
                decoder=decoder,  # type: ignore[arg-type]
            ).splits["train"]
            for decoder in ("pil", "torchvision")
        }
        tail = [v2.ToImage(), v2.RandomCrop(224), v2.RandomHorizontalFlip()]
        theirs = ImageFolder(folder, v2.Compose(tail))

        def endless() -> Iterator[Any]:
            while True:
                options = {"num_workers": WORKERS, "multiprocessing_context": "fork"}
                sampler = torch.utils.data.RandomSampler(theirs, replacement=True, num_samples=10**6)
                yield from DataLoader(theirs, batch, sampler=sampler, **options)  # type: ignore[arg-type]

        def ours(decoder: str, *, bytes_left: bool) -> Callable[[], Iterator[Any]]:
            return lambda: loader(sources[decoder], [crop, FLIP, *FLOATS], batch, WORKERS, bytes_left=bytes_left)

        batches = max(2, 2 * count // batch)
        table.measure(
            {
                "decoding, torchvision": decoding(decode_torchvision, paths),
                "decoding, Pillow": decoding(decode_pil, paths),
                "DataLoader": steady(endless, batch, batches),
                "distrain, torchvision, bytes": steady(ours("torchvision", bytes_left=True), batch, batches),
                "distrain, torchvision, floats": steady(ours("torchvision", bytes_left=False), batch, batches),
                "distrain, pil, bytes": steady(ours("pil", bytes_left=True), batch, batches),
            },
            base="decoding, torchvision",
            rounds=rounds,
            title=f"JPEG files of 500 × 375, images per CPU second, {WORKERS} processes",
            goals={"distrain, torchvision, bytes": GOAL},
        )


# --------------------------------------------------------------------------------------------------------------------
# Tokens


def tokens(table: Table, rounds: int, count: int, steps: int, seconds: float) -> None:
    """Add the rows of tokens."""
    seq_len, batch, shards = 1024, 32, 64
    rows = (count - 1) // seq_len
    generator = np.random.default_rng(0)
    batches = list(generator.integers(0, rows, (steps, batch)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        generator.integers(0, 50_000, count, dtype=np.uint16).tofile(path)
        mapped = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))

        def rows_copied(ids: np.ndarray) -> np.ndarray:
            copied = np.empty((len(ids), seq_len), np.uint16)
            for row, begin in enumerate((ids * seq_len).tolist()):
                copied[row] = mapped[begin : begin + seq_len]
            return copied

        def nanogpt(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            begins = (ids * seq_len).tolist()
            x = torch.stack([torch.from_numpy(mapped[at : at + seq_len].astype(np.int64)) for at in begins])
            y = torch.stack([torch.from_numpy(mapped[at + 1 : at + 1 + seq_len].astype(np.int64)) for at in begins])
            return x, y

        subjects: dict[str, Callable[[np.ndarray], Any]] = {
            "rows copied": rows_copied,
            "nanoGPT": nanogpt,
            "distrain, one map": TokenRows([mapped], seq_len, [range(rows)]).fetch,
            f"distrain, {shards} maps": TokenRows(np.array_split(mapped, shards), seq_len, [range(rows)]).fetch,
        }

        def over_all(fetch: Callable[[np.ndarray], Any]) -> Callable[[], None]:
            def work() -> None:
                for ids in batches:
                    fetch(ids)

            return work

        amount = steps * batch * seq_len / 1e6
        table.measure(
            {name: cpu_rate(over_all(fetch), amount, seconds) for name, fetch in subjects.items()},
            base="rows copied",
            rounds=rounds,
            title="Rows of 1024 tokens, million tokens per CPU second, one thread",
            goals={"distrain, one map": GOAL},
        )


def main() -> None:
    """Measure and print the tables."""
    parser = options_of(__doc__, rounds=7)
    parser.add_argument("--part", nargs="+", choices=["images", "jpeg", "tokens"], default=["images", "jpeg", "tokens"])
    a = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    table = Table("Input", "a second", lower_is_better=False)
    rounds = 2 if a.quick else a.rounds
    if "images" in a.part:
        images(table, rounds, 0.1 if a.quick else 0.5)
    if "jpeg" in a.part:
        jpeg(table, rounds, *((32, 8) if a.quick else (256, 32)))
    if "tokens" in a.part:
        tokens(table, rounds, *((50_000_000, 60, 0.0) if a.quick else (200_000_000, 300, 0.3)))
    table.save(a.save)


if __name__ == "__main__":
    main()
