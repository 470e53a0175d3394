"""Writes a checkpoint's model as the files that others read: one safetensors file, several with an index, or a `.pt`.

Imports no torch.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.checkpoints.dtypes import DTYPES, FLOATS, ITEM_SIZES
from distrain.checkpoints.export.companion_files import CONFIG
from distrain.checkpoints.export.copying import Output, write_safetensors
from distrain.checkpoints.export.opening import open_foreign, open_native
from distrain.checkpoints.format import MANIFEST, error_reason
from distrain.checkpoints.hiding import hidden, is_leftover
from distrain.checkpoints.reading import is_checkpoint_name, read_manifest
from distrain.checkpoints.sources import Source
from distrain.run.json_files import fsync
from distrain.system.errors import UserError, close_names, some

if TYPE_CHECKING:
    from distrain.checkpoints.export.model_card import UserCode

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
    skipped: tuple[str, ...] = ()
    """What a foreign checkpoint holds besides the model."""


def export(
    checkpoint: Path | str | Source,
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
    card: bool = False,
    averaged: bool = False,
    pt: bool = False,
    code: UserCode | None = None,
) -> Exported:
    """Write the model of a checkpoint, distrain's own or a foreign one, or one that is open, to `out`.

    `out` is a `.safetensors` file, a `.pt` or `.pth` file, or a folder, which gets a `model.safetensors`, or with `pt`
    a `model.pt`. `shards` is the largest size of one file (bytes, or "5GB"): a larger model becomes
    `model-00001-of-00003.safetensors` and so on, beside a `model.safetensors.index.json`, as Hugging Face lays them
    out. Tensors have their canonical names; tied ones are written under each of their names, because
    `load_state_dict(strict=True)` asks for all of them. `dtype` (bf16, fp16, fp32, fp64) converts floating-point
    tensors only, and refuses finite values that would become infinite. `ema` takes the moving average instead of the
    weights. A transformers model that is exported to a folder, or as `model.safetensors`, gets its `config.json` and
    its `companion_files` beside it, so that `from_pretrained` opens the folder of a safetensors file. `verify=False`
    skips the check of the bytes against their hashes. `sync=False` does not wait for the disk: safe from a crash of the
    program, not from one of the machine. `format` and `trust` are `open_foreign`'s. With `card` a folder also gets what
    `model_card` writes beside a checkpoint of distrain's own; `averaged`: whether the tensors of `checkpoint` are the
    average already; `code`: what of the user's is copied there.

    All files are written under hidden names and renamed at the end, the index last. Raises UserError: a file that
    exists (unless `overwrite`), a symbolic link, a checkpoint that does not verify, a full disk.
    """
    is_folder = names_folder(Path(out))
    out = _output_path(Path(out), "model.pt" if pt else "model.safetensors")
    limit = None if shards is None else _parse_size(shards)
    target = None if dtype is None else _parse_dtype(dtype)
    with checkpoint if isinstance(checkpoint, Source) else _open(Path(checkpoint), verify, format, trust) as source:
        notes = list(source.notes)
        outputs, unaveraged = _choose(source, target, ema)
        groups = _cut(outputs, limit)
        is_safetensors = out.suffix == ".safetensors"
        if not is_safetensors and len(groups) > 1:
            raise UserError(f"{out}: only safetensors files come in shards; name it .safetensors or remove shards")
        shard_name = f"{out.stem}-{{:05d}}-of-{len(groups):05d}.safetensors".format
        paths = [out] if len(groups) == 1 else [out.with_name(shard_name(n + 1)) for n in range(len(groups))]
        beside: dict[Path, Callable[[Path], object]] = {}
        in_folder = out.name == "model.safetensors" or is_folder
        if (source.path / MANIFEST).is_file() and (source.config or card) and in_folder:
            from distrain.checkpoints.export.text_files import companions_as_trained

            manifest = read_manifest(source.path)
            source.companions, more = companions_as_trained(source.companions, manifest, source.scratch())
            notes += more
        if source.config and (out.name == "model.safetensors" or (is_folder and pt)):
            beside[out.with_name(CONFIG)] = partial(_write_text, _with_dtype(source.config, outputs))
            if source.companions:
                from distrain.checkpoints.export.model_card import unlike_processor

                notes += unlike_processor(source.path, source.companions)
            for name, file in source.companions.items():
                if not _same(out.parent / name, file):  # a file that the user has put there, with the same content
                    beside[out.parent / name] = partial(shutil.copyfile, file)
        elif source.config:
            missing = some([CONFIG, *source.companions])
            notes.append(f"not beside a file of this name: {missing}; export to a folder has them")
        if card and is_folder and (source.path / MANIFEST).is_file():
            rounded = (
                target
                if any(ITEM_SIZES[each.dtype] < ITEM_SIZES[each.stored.spec.dtype] for each in outputs.values())
                else None
            )
            _add_card(beside, source, out.parent, averaged=ema or averaged, pt=pt, code=code, rounded=rounded)
        nbytes = sum(item.nbytes for item in outputs.values())
        index = {}
        if len(groups) > 1:
            weight_map = {name: path.name for path, group in zip(paths, groups, strict=True) for name in group}
            content = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            index = {_index_path(out): partial(_write_text, json.dumps(content, indent=2))}
        made = _missing_folders(out.parent)
        present = _make_room(out, overwrite, nbytes, [*beside])
        checks = source.checks(name for name in source.names if not name.startswith("optimizer/")) if verify else []
        writes = beside | index

        def write_tensors(hidden_paths: dict[Path, Path]) -> None:
            files = {hidden_paths[path]: group for path, group in zip(paths, groups, strict=True)}
            if is_safetensors:
                write_safetensors(source, files, metadata={"format": "pt"}, checks=checks)
            else:
                from distrain.checkpoints.export.torch_file import write_torch_file

                write_torch_file(source, groups[0], hidden_paths[out], checks)

        try:
            # shards of another number would be taken for a part of this export
            _publish(paths, write_tensors, writes, present - {*paths, *writes}, sync)
        except BaseException:
            for folder in made:
                with suppress(OSError):  # others may have put something there
                    folder.rmdir()
            raise
    if is_safetensors and (pairs := [name for name, each in outputs.items() if DTYPES[each.dtype].pair]):
        notes.append(
            f"as pairs of real numbers, for tensor.view(dtype); a .pt file has them as they are: {some(pairs)}"
        )
    if target and (narrow := [name for name, each in outputs.items() if each.dtype.startswith("F8")]):
        notes.append(f"not converted, as float8 may have a scale elsewhere: {some(narrow)}")
    if unaveraged:
        notes.append(f"not averaged, and taken as they are: {some(unaveraged)}")
    return Exported((*paths, *writes), nbytes, len(outputs), tuple(notes), tuple(source.skipped))


def _add_card(
    beside: dict[Path, Callable[[Path], object]],
    source: Source,
    folder: Path,
    *,
    averaged: bool,
    pt: bool,
    code: UserCode | None,
    rounded: str | None,
) -> None:
    """Add to what is written beside a model how it is used, the tokenizer, and code of the user's."""
    from distrain.checkpoints.export.model_card import CODE, card_files

    manifest = read_manifest(source.path)
    if not manifest.recipe:
        return  # an import, of which no run is known
    companions = source.companions
    for name, file in companions.items():
        if folder / name not in beside and not _same(folder / name, file):
            beside[folder / name] = partial(shutil.copyfile, file)
    for name, file in (code.files if code is not None else {}).items():
        if not _same(folder / CODE / name, file):
            beside[folder / CODE / name] = partial(shutil.copyfile, file)
    texts = card_files(
        source.path, manifest, averaged=averaged, companions=companions, pt=pt, code=code, rounded=rounded
    )
    for name, text in texts.items():
        beside[folder / name] = partial(_write_text, text)


def _same(path: Path, file: Path) -> bool:
    return path.is_file() and not path.is_symlink() and filecmp.cmp(path, file, shallow=False)


def _open(path: Path, verify: bool, format: str | None, trust: bool) -> Source:
    if format is None and (not path.exists() or (path / MANIFEST).exists() or is_checkpoint_name(path.name)):
        if trust:
            raise UserError(
                f"{path}: --trust is for other trainers' checkpoints, and this one holds no code; remove it"
            )
        return open_native(path, verify)
    source = open_foreign(path, format=format, trust=trust)
    if any(name.startswith("optimizer/") for name in source.names):
        source.skipped.append("the optimizer's state")
    return source


# --------------------------------------------------------------------------------------------------------------------
# What is written, and where to


def names_folder(out: Path) -> bool:
    """Whether this is the path of a folder for a model, and not of a file."""
    return not out.suffix or out.is_dir()


def _output_path(out: Path, name: str) -> Path:
    if out.suffix in (".safetensors", ".pt", ".pth"):
        return out
    if out.suffix and not out.is_dir():
        raise UserError(
            f"{out}: {out.suffix!r} is not a format of exports; name a .safetensors, .pt, .pt2 or .onnx file, "
            "or a folder"
        )
    return out / name


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


def _choose(source: Source, dtype: str | None, ema: bool) -> tuple[dict[str, Output], list[str]]:
    """Return the tensors of the export by canonical name, aliases included, and the parameters without average."""
    averages = _averages(source) if ema else {}
    outputs, unaveraged = {}, []
    replaced = made_by_hooks(source, ema=ema)
    for full in [*source.names, *source.aliases]:
        if full.startswith("model/") and full not in source.renamed:
            name, stored = full.removeprefix("model/"), source.aliases.get(full, full)
            chosen = averages.get(name, averages.get(stored.removeprefix("model/"), stored))
            chosen = replaced.get(name, chosen)
            tensor = source.tensors[chosen]
            if ema and chosen == stored and full == stored and tensor.spec.role == "parameter":
                unaveraged.append(name)
            outputs[name] = Output(
                chosen, tensor, dtype if dtype and tensor.spec.dtype in FLOATS else tensor.spec.dtype
            )
    if not outputs:
        raise UserError(f"{source.path} holds no model: none of its tensors is named model/…")
    # wide elements first: each tensor is then aligned to its element
    return dict(sorted(outputs.items(), key=lambda item: (-ITEM_SIZES[item[1].dtype], item[0]))), unaveraged


def made_by_hooks(source: Source, *, ema: bool) -> dict[str, str]:
    """Return {canonical name: full name of the tensor} that hooks of the model's state dict put in a tensor's place."""
    prefix = "exported-ema/" if ema else "exported/"
    return {name.removeprefix(prefix): name for name in source.names if name.startswith(prefix)}


def _averages(source: Source) -> dict[str, str]:
    """Return {canonical name: full name of its average}; raises UserError if they are not those of this model."""
    stored = {name: name for name in source.names} | source.aliases
    averages = {name.removeprefix("ema/"): full for name, full in stored.items() if name.startswith("ema/")}
    model = {name.removeprefix("model/"): full for name, full in stored.items() if name.startswith("model/")}
    if not averages:
        raise UserError(f"{source.path} has no moving average of the weights: train.ema was off; export without ema")
    advice = "expected the averages of the model's own parameters; export the weights themselves without ema"
    if strays := [name for name in averages if name not in model]:
        raise UserError(
            f"{source.path}: the moving average has {some(strays)}, which the model has not"
            f"{close_names(strays[0], model, advice)}"
        )
    for name, full in averages.items():
        found, needed = list(source.spec(full).shape), list(source.spec(model[name]).shape)
        if found != needed:
            raise UserError(
                f"{source.path}: the moving average of {name} has the shape {found}, and it {needed}; {advice}"
            )
    trained = {
        name.removeprefix("optimizer/").rpartition("/")[0] for name in source.names if name.startswith("optimizer/")
    }
    averaged = {model[name] for name in averages}
    if lacking := sorted(name for name in trained & model.keys() if model[name] not in averaged):
        raise UserError(f"{source.path}: {some(lacking)} was trained and has no moving average; {advice}")
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


def _with_dtype(config: str, outputs: dict[str, Output]) -> str:
    """Return a config.json that names the dtype of the written weights, to which from_pretrained converts them."""
    dtypes = {output.dtype for output in outputs.values()} & {*FLOATS}
    if len(dtypes) != 1:
        return config  # some are kept wide on purpose, as the original did
    dtype = DTYPES[dtypes.pop()].torch

    def named(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            k: dtype if k in ("dtype", "torch_dtype") and isinstance(v, str) else named(v) for k, v in value.items()
        }

    return json.dumps(named(json.loads(config)), indent=2)


def _index_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.safetensors.index.json")


def _make_room(out: Path, overwrite: bool, nbytes: int, beside: Sequence[Path]) -> set[Path]:
    """Make the folder and check that the export can go there; return the files of an earlier export of this name."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        entries = list(out.parent.iterdir())
        free = shutil.disk_usage(out.parent).free
        for entry in entries:
            if entry.name.startswith(f".tmp-{out.stem}") and is_leftover(entry):
                entry.unlink()
    except OSError as error:
        raise UserError(f"{out.parent}: {error_reason(error)}") from error
    shard = re.compile(re.escape(out.stem) + r"-[0-9]{5}-of-[0-9]{5}\.safetensors")
    own = {out, *beside}
    found = {entry for entry in entries if entry in own}
    found |= {each for each in beside if each.parent != out.parent and (each.exists() or each.parent.is_symlink())}
    if out.suffix == ".safetensors":
        found |= {entry for entry in entries if entry == _index_path(out) or shard.fullmatch(entry.name)}
    linked = {each for each in found if each.parent != out.parent and each.parent.is_symlink()}
    if odd := sorted(linked | {entry for entry in found if entry.is_symlink() or not entry.is_file()}):
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


def _missing_folders(folder: Path) -> list[Path]:
    """Return the folder and those above it that are not there, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _publish(
    tensors: Sequence[Path],
    write_tensors: Callable[[dict[Path, Path]], None],
    others: dict[Path, Callable[[Path], object]],
    stale: set[Path],
    sync: bool,
) -> None:
    """Write each file under a hidden name, rename them all once they are complete, and remove the stale ones.

    `write_tensors` is given {path: hidden path} of all.
    """
    hidden_paths = {path: path.with_name(hidden("tmp", path.name)) for path in (*tensors, *others)}
    folder = tensors[0].parent
    try:
        write_tensors(hidden_paths)
        for path, write in others.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(hidden_paths[path])
        if sync:
            for path in hidden_paths.values():
                fsync(path)
        for path, written in hidden_paths.items():
            os.rename(written, path)
        for path in stale:
            path.unlink()
        if sync:
            fsync(folder)
    except OSError as error:
        raise UserError(f"the export to {folder} failed: {error_reason(error)}") from error
    finally:
        for path in hidden_paths.values():
            path.unlink(missing_ok=True)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
