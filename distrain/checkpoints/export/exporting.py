"""Turn a checkpoint into the file that others read: one safetensors file, several with an index, or a `.pt`.

Whatever wrote the checkpoint: distrain, or one of the trainers in `distrain.checkpoints.foreign`. Imports no torch.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distrain.checkpoints.dtypes import DTYPES, ITEM_SIZES
from distrain.checkpoints.export.companion_files import CONFIG, FOLDER, files_beside, kept_beside, run_of
from distrain.checkpoints.export.copying import Output, write_safetensors
from distrain.checkpoints.export.opening import BUFFERS, detect, open_foreign
from distrain.checkpoints.export.sources import NativeTensors, Tensors
from distrain.checkpoints.export.torch_file import write_torch_file
from distrain.checkpoints.floats import FLOATS
from distrain.checkpoints.foreign.common import NO_TENSORS, some
from distrain.checkpoints.format import MANIFEST, Manifest, explain
from distrain.checkpoints.reading import Reader, find_checkpoint, is_checkpoint_name
from distrain.checkpoints.writing import hidden, is_leftover, sync_folder
from distrain.config import UserError, close_names
from distrain.run.folder import RunDir

_DTYPES = {
    "float64": "F64", "fp64": "F64", "f64": "F64", "float32": "F32", "fp32": "F32", "f32": "F32",
    "float16": "F16", "fp16": "F16", "f16": "F16", "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    paths: tuple[Path, ...]
    """The file, or the shards and their index."""
    nbytes: int
    """Bytes of all the tensors."""
    tensors: int
    """Number of tensors, aliases included."""
    notes: tuple[str, ...] = ()
    """How a foreign checkpoint was understood."""
    left: tuple[str, ...] = ()
    """What a foreign checkpoint holds besides the model."""


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    shards: str | int | None = None,
    ema: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    sync: bool = True,
    format: str | None = None,
    trust: bool = False,
) -> Exported:
    """Write the model of a checkpoint, distrain's own or a foreign one, to `out`.

    `out` is a `.safetensors` file, a `.pt` or `.pth` file, or a folder, which gets a `model.safetensors`. `shards` is
    the most bytes of one file (a number, or "5GB"): a larger model goes to `model-00001-of-00003.safetensors` and so
    on, beside a `model.safetensors.index.json`, as Hugging Face lays them out. Parameters and buffers have their
    plain names. Tied tensors are written under each of their names, because `load_state_dict(strict=True)` asks for
    all of them. `dtype` (bf16, fp16, fp32, fp64) changes floating-point tensors only, and refuses finite values that
    would become infinite. `ema` takes the moving average instead of the weights. A model of the transformers library
    whose file is named `model.safetensors`, as in a folder, gets its `config.json` beside it, and what else lay beside
    the weights that it started from (tokenizer, generation settings: `companion_files`), so that `from_pretrained`
    opens the folder as it did that one. `verify=False` does not check the bytes against their hashes first.
    `sync=False` does not wait for the disk: safe from a crash of the program, not from one of the machine.
    `format` and `trust` are `open_foreign`'s.

    Everything is written under hidden names and renamed at the end, the index last. Raises UserError: a file that is
    there already (unless `overwrite`), a symbolic link, a checkpoint that does not verify, a full disk.
    """
    out = _resolve(Path(out))
    limit = None if shards is None else _parse_size(shards)
    target = None if dtype is None else _parse_dtype(dtype)
    with _opened(Path(checkpoint), verify, format, trust) as (tensors, config, files, notes, left):
        outputs, unaveraged = _choose(tensors, target, ema)
        groups = _cut(outputs, limit)
        if out.suffix != ".safetensors" and len(groups) > 1:
            raise UserError(f"{out}: only safetensors files come in shards; name it .safetensors or leave shards out")
        paths = _shard_paths(out, len(groups))
        index = [_index_path(out)] if len(groups) > 1 else []
        in_folder = out.name == "model.safetensors"
        if not in_folder and (config or files):
            notes = [*notes, f"not beside a file of this name: {some([CONFIG, *files])}; export to a folder has them"]
        beside = [out.with_name(CONFIG)] if config and in_folder else []
        copies = {out.parent / name: file for name, file in files.items() if in_folder}
        # what somebody has put there is as good, where it is the same
        copies = {path: file for path, file in copies.items() if not _same(path, file)}
        beside += copies
        nbytes = sum(item.nbytes for item in outputs.values())
        present = _make_room(out, overwrite, nbytes, beside)
        writes: list[tuple[Path, Callable[[Path], None]]] = []
        for path, group in zip(paths, groups, strict=True):
            if out.suffix == ".safetensors":
                writes.append((path, partial(_write_safetensors, tensors, group)))
            else:
                writes.append((path, partial(write_torch_file, tensors, group)))
        writes += [(path, partial(_write_text, config or "")) for path in beside if path not in copies]
        writes += [(path, partial(shutil.copyfile, file)) for path, file in copies.items()]
        writes += [(path, partial(_write_index, dict(zip(paths, groups, strict=True)), nbytes)) for path in index]
        # shards of another number would be taken for a part of this export
        _publish(writes, present - {*paths, *index, *beside}, sync)
    if out.suffix == ".safetensors" and (pairs := [name for name, each in outputs.items() if DTYPES[each.dtype].pair]):
        notes = [
            *notes,
            f"as pairs of real numbers, for tensor.view(dtype); a .pt file has them as they are: {some(pairs)}",
        ]
    if unaveraged:
        notes = [*notes, f"not averaged, and taken as they are: {some(unaveraged)}"]
    return Exported((*paths, *beside, *index), nbytes, len(outputs), tuple(notes), tuple(left))


def find_source(target: Path | str, *, best: bool = False, format: str | None = None) -> tuple[Path, str | None]:
    """Return what a command means: a checkpoint, or of a run one of its own, or something foreign and its format.

    Raises UserError where it is none of them.
    """
    path = Path(target)
    own = (path / MANIFEST).exists() or RunDir(path).checkpoints.is_dir() or not path.exists()
    if format is None and (own or is_checkpoint_name(path.name)):
        return find_checkpoint(path, best=best), None
    if best:
        raise UserError(f"{path} is not a run of distrain's; --best goes with a run folder")
    return path, format or detect(path)


def open_tensors(path: Path | str) -> tuple[Tensors, list[str]]:
    """Return the tensors of a run, a checkpoint or something foreign, and notes on how they were understood.

    They are open for as long as they are used. The bytes are checked against their hashes first. Only the model is
    looked at: whatever else a trainer has saved with it. Raises UserError.
    """
    found, format = find_source(path)
    if format is None:
        return NativeTensors(Reader(found)), []
    opened = open_foreign(found, format=format, optimizer=False)
    source = opened.__enter__()
    source.verify(name for name in source.names if name.startswith("model/"))
    source.keep(opened)
    # what is a buffer makes no difference where a model is there that knows it
    notes = [note for note in source.notes if not note.startswith(BUFFERS)]
    return source, [*notes, *(left for left in source.left if NO_TENSORS in left)]


def _same(path: Path, file: Path) -> bool:
    return path.is_file() and not path.is_symlink() and filecmp.cmp(path, file, shallow=False)


@contextmanager
def _opened(
    path: Path, verify: bool, format: str | None, trust: bool
) -> Iterator[tuple[Tensors, str | None, dict[str, Path], list[str], list[str]]]:
    """Open a checkpoint of any format: its tensors, the configuration of transformers, notes, and what is left.

    Before the last two, the files that belong beside the weights, by name.
    """
    if format is None and (not path.exists() or (path / MANIFEST).exists() or is_checkpoint_name(path.name)):
        if trust:
            raise UserError(f"{path}: --trust is for what other trainers wrote, and this holds nothing that runs")
        with Reader(path, verify) as reader:
            config, files = transformers_config(reader.manifest), kept_beside(reader.path)
            expected = reader.manifest.scalars.get("transformers_files")
            gone = sorted(set(expected) - set(files)) if isinstance(expected, list) else []
            notes = [f"left out: {some(gone)}, which are not in {run_of(reader.path) / FOLDER}"] if gone else []
            if values := sorted(reader.manifest.scalars.get("model_state", {})):
                notes.append(f"not in the file, being no tensors: {some(values)}; load it with strict=False")
            yield NativeTensors(reader), config, files if config else {}, notes, []
        return
    with open_foreign(path, format=format, trust=trust) as source:
        if verify:
            source.verify(name for name in source.names if not name.startswith("optimizer/"))
        left = source.left + (
            ["the optimizer's state"] if any(n.startswith("optimizer/") for n in source.names) else []
        )
        folder = source.path if source.config and source.path.is_dir() else None
        files = {name: folder / name for name in files_beside(folder)[0]} if folder is not None else {}
        yield source, source.config, files, source.notes, left


def transformers_config(manifest: Manifest) -> str | None:
    """Return the `config.json` of a model of transformers, as a checkpoint of distrain keeps it."""
    config = manifest.scalars.get("transformers_config")
    return config if isinstance(config, str) else None


# --------------------------------------------------------------------------------------------------------------------
# What is written, and where to


def _resolve(out: Path) -> Path:
    if out.suffix in (".safetensors", ".pt", ".pth"):
        return out
    if out.suffix and not out.is_dir():
        raise UserError(
            f"{out}: {out.suffix!r} is not a format of exports; name a .safetensors or .pt file, or a folder"
        )
    return out / "model.safetensors"


def _parse_size(size: str | int) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UserError(f"shards {size!r} is not a size; write a number of bytes, or '5GB', '500MB', '2GiB'")
    return int(float(match[1]) * unit)


def _parse_dtype(dtype: str) -> str:
    if dtype.lower() not in _DTYPES:
        raise UserError(f"no dtype {dtype!r}; it is one of bf16, fp16, fp32, fp64{close_names(dtype, _DTYPES)}")
    return _DTYPES[dtype.lower()]


def _choose(tensors: Tensors, dtype: str | None, ema: bool) -> tuple[dict[str, Output], list[str]]:
    """Return the tensors of the export by their plain names, aliases included, and the parameters without average."""
    names, aliases = set(tensors.names), tensors.aliases
    if ema and not any(name.startswith("ema/") for name in names):
        raise UserError(f"{tensors.path} has no moving average of the weights: train.ema was off; leave ema out")
    averages = _averages(tensors) if ema else {}
    outputs, unaveraged = {}, []
    instead, renamed = made_by_hooks(tensors, ema=ema)
    for full in [*tensors.names, *aliases]:
        if full.startswith("model/") and full not in renamed:
            plain, stored = full.removeprefix("model/"), aliases.get(full, full)
            source = averages.get(plain, averages.get(stored.removeprefix("model/"), stored))
            source = instead.get(plain, source)
            spec = tensors.spec(source)
            if ema and source == stored and full == stored and spec.role == "parameter":
                unaveraged.append(plain)
            wanted = dtype if dtype and spec.dtype in FLOATS else spec.dtype
            outputs[plain] = Output(source, spec, tensors.stored_dtype(source), wanted)
    if not outputs:
        raise UserError(f"{tensors.path} holds no model: none of its tensors is named model/…")
    # wide elements first: each tensor is then aligned to its element
    return dict(sorted(outputs.items(), key=lambda item: (-ITEM_SIZES[item[1].dtype], item[0]))), unaveraged


def made_by_hooks(tensors: Tensors, *, ema: bool) -> tuple[dict[str, str], set[str]]:
    """Return what hooks of the model's state dict make of it: where a name's other tensor is, and names taken out.

    The first are plain names, the second full ones: those tensors are there under other names.
    """
    made = "exported-ema/" if ema else "exported/"
    scalars = tensors.reader.manifest.scalars if isinstance(tensors, NativeTensors) else {}
    instead = {name.removeprefix(made): name for name in tensors.names if name.startswith(made)}
    return instead, set(scalars.get("model_renamed", []))


def _averages(tensors: Tensors) -> dict[str, str]:
    """Return {plain name: where its average is}; raises UserError where they are not those of this model."""
    averages = {name.removeprefix("ema/"): name for name in tensors.names if name.startswith("ema/")}
    averages |= {name.removeprefix("ema/"): other for name, other in tensors.aliases.items() if name.startswith("ema/")}
    model = {name.removeprefix("model/"): tensors.aliases.get(name, name) for name in [*tensors.names, *tensors.aliases]
             if name.startswith("model/")}  # fmt: skip
    mend = "; expected the averages of the model's own parameters; leave ema out for the weights themselves"
    if strays := [name for name in averages if name not in model]:
        raise UserError(
            f"{tensors.path}: the moving average has {some(strays)}, which the model has not"
            f"{close_names(strays[0], model)}{mend}"
        )
    for name, source in averages.items():
        found, needed = tensors.spec(source).shape, tensors.spec(model[name]).shape
        if found != needed:
            raise UserError(
                f"{tensors.path}: the moving average of {name} has the shape {list(found)}, and it {list(needed)}{mend}"
            )
    trained = {
        name.removeprefix("optimizer/").rpartition("/")[0] for name in tensors.names if name.startswith("optimizer/")
    }
    averaged = {model[name] for name in averages}
    if lacking := sorted(name for name in trained & set(model) if model[name] not in averaged):
        raise UserError(f"{tensors.path}: {some(lacking)} was trained and has no moving average{mend}")
    return averages


def _cut(outputs: dict[str, Output], limit: int | None) -> list[dict[str, Output]]:
    """Divide the tensors into files of at most `limit` bytes; a larger tensor has a file of its own."""
    groups: list[dict[str, Output]] = [{}]
    filled = 0
    for name, output in outputs.items():
        if limit is not None and groups[-1] and filled + output.nbytes > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = output
        filled += output.nbytes
    return groups


def _shard_paths(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]


def _index_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.safetensors.index.json")


def _make_room(out: Path, overwrite: bool, nbytes: int, beside: Sequence[Path]) -> set[Path]:
    """Make the folder and see that the export can go there; return the files of an earlier export of this name."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        entries = list(out.parent.iterdir())
        free = shutil.disk_usage(out.parent).free
        for entry in entries:
            if entry.name.startswith(f".tmp-{out.stem}") and is_leftover(entry):
                entry.unlink()
    except OSError as error:
        raise UserError(f"{out.parent}: {explain(error)}") from error
    shard = re.compile(re.escape(out.stem) + r"-[0-9]{5}-of-[0-9]{5}\.safetensors")
    family = {out, *beside} | ({_index_path(out)} if out.suffix == ".safetensors" else set())
    found = {e for e in entries if e in family or (out.suffix == ".safetensors" and shard.fullmatch(e.name))}
    if odd := sorted(entry for entry in found if entry.is_symlink() or not entry.is_file()):
        raise UserError(
            f"{odd[0]} is a symbolic link or no regular file, and is not written over; remove it or choose another name"
        )
    if found and not overwrite:
        raise UserError(f"{min(found)} exists already; choose another name, or --overwrite it")
    if free < nbytes:
        raise UserError(
            f"{out.parent}: the export has {nbytes:,} bytes, and the disk has {free:,} left; free some space"
        )
    return found


def _publish(writes: Sequence[tuple[Path, Callable[[Path], None]]], stale: set[Path], sync: bool) -> None:
    """Write each file under a hidden name, rename them all once they are complete, and remove the stale ones."""
    hidden_paths = {path: path.with_name(hidden("tmp", path.name)) for path, _ in writes}
    folder = writes[0][0].parent
    try:
        for path, write in writes:
            path.parent.mkdir(exist_ok=True)
            write(hidden_paths[path])
            if sync:
                with open(hidden_paths[path], "rb") as file:
                    os.fsync(file.fileno())
        for path, _ in writes:
            os.rename(hidden_paths[path], path)
        for path in stale:
            path.unlink()
        if sync:
            sync_folder(folder)
    except OSError as error:
        raise UserError(f"the export to {folder} failed: {explain(error)}") from error
    finally:
        for path in hidden_paths.values():
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# Writing


def _write_safetensors(tensors: Tensors, outputs: dict[str, Output], path: Path) -> None:
    write_safetensors(tensors, outputs, path, metadata={"format": "pt"})


def _write_text(text: str, path: Path) -> None:
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def _write_index(shards: dict[Path, dict[str, Output]], nbytes: int, path: Path) -> None:
    weight_map = {name: shard.name for shard, group in shards.items() for name in group}
    content = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_text(json.dumps(content, indent=2), path)
