"""Folders of DeepSpeed's save_checkpoint, for ZeRO-1, 2 and 3.

The fp32 master weights and the optimizer's state lie in flat tensors, a part on each rank. ZeRO-1 and 2 lay the
parameters of a group end to end, each followed by its alignment padding, and cut that among the ranks; ZeRO-3 cuts each
parameter among the ranks and lays one rank's parts of all of them end to end, over one or more flat tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from distrain.checkpoints.export.pickles import Made, View
from distrain.checkpoints.export.sources import Source, Stored, flat
from distrain.checkpoints.foreign.common import FlatParts, TorchFile, basename, number, plain_names, some
from distrain.checkpoints.foreign.optimizers import add_by_name
from distrain.checkpoints.format import TensorSpec
from distrain.checkpoints.reading import open_plain
from distrain.config import UserError
from distrain.config.registry import formats

_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]{1,7})_mp_rank_([0-9]{2,5})_optim_states\.pt")
_ZERO3 = re.compile(r"zero_pp_rank_([0-9]{1,7})_mp_rank_([0-9]{2,5})_model_states\.pt")
_MODEL = re.compile(r"mp_rank_([0-9]{2,5})_model_states\.pt")
_PARALLEL = re.compile(r"(?:layer_[0-9]+(?:-|_expert)|expp_rank_|zero$)")
_SORTS = {
    "layer": "it is of pipeline or expert parallelism",
    "expp": "it is of expert parallelism",
    "zero": "it is of a universal checkpoint",
}
_USED = {
    "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params",
    "global_steps", "ds_config", "ds_version", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions",
    "optimizer",
}  # fmt: skip
_WORLD = ("latest", "zero_to_fp32.py", "zero_to_torch.py")


def is_folder(folder: Path) -> bool:
    """Whether this is a folder of save_checkpoint, or one of its tags."""
    if not folder.is_dir():
        return False
    return (folder / "latest").exists() or any(_ours(entry.name) for entry in folder.iterdir())


def _ours(name: str) -> bool:
    return bool(_OPTIM.fullmatch(name) or _ZERO3.fullmatch(name) or _MODEL.fullmatch(name))


@formats.register(
    "deepspeed", about="a folder of DeepSpeed's save_checkpoint, ZeRO-1, 2 or 3", order=1, found=is_folder
)
def open_folder(source: Source, folder: Path, *, trust: bool) -> None:
    """Add the fp32 weights, buffers and optimizer state of a folder, of the tag that `latest` names."""
    tagged = _tagged(folder)
    if odd := sorted(entry.name for entry in tagged.iterdir() if _PARALLEL.match(entry.name)):
        raise UserError(f"{tagged / odd[0]}: {_SORTS[odd[0].split('_')[0]]}, which is not read here")
    ranks = _by_rank(tagged, _OPTIM)
    if not ranks:
        raise UserError(
            f"{tagged}: there are no *_optim_states.pt files, in which DeepSpeed keeps the fp32 weights of ZeRO-1, 2 "
            "and 3. Import mp_rank_00_model_states.pt itself for the weights in the precision that they were trained in"
        )
    optims = [TorchFile(source, path, trust=trust) for path in ranks]
    states = [_mapping(file, file.root, "optimizer_state_dict") for file in optims]
    stage = _stage(optims[0], states[0])
    count = states[0].get("partition_count")
    count = max(count) if isinstance(count, list) and count else count
    if count != len(ranks):
        raise UserError(
            f"{tagged}: it was written by {count} ranks, and there are {len(ranks)} *_optim_states.pt files; the "
            "folder is incomplete, or holds files of two checkpoints"
        )
    models = _by_rank(tagged, _ZERO3) if stage == 3 else _by_rank(tagged, _MODEL)
    if len(models) != (count if stage == 3 else 1):
        raise UserError(f"{tagged}: found {len(models)} model states for ZeRO-{stage} of {count} ranks")
    files = [TorchFile(source, path, trust=trust) for path in models]
    heads = [_mapping(file, file.root) for file in files]
    head, file = heads[0], files[0]
    source.what = f"DeepSpeed ZeRO-{stage} of {count} rank{'s' * (count != 1)}"
    if isinstance(head.get("ds_version"), str):
        source.what += f", by DeepSpeed {head['ds_version'][:20]}"
    shapes = _shapes(file, head)
    plain = plain_names(source, _all_names(file, head))
    _Folder(source, stage, plain, shapes, optims, states, files, heads).add()
    steps = head.get("global_steps")
    source.step = steps if type(steps) is int and 0 <= steps < 10**18 else None
    rest = [str(key) for key, value in head.items() if key not in _USED and value not in (None, 0, {}, [])]
    if rest:
        source.left.append(f"{file.path.name}: {some(rest, 12)}")
    if isinstance(states[0].get("loss_scaler"), Made):
        source.left.append("the state of the loss scaler")
    others = [entry.name for entry in sorted({*tagged.iterdir(), *folder.iterdir()}) if not _ours(entry.name)]
    others = [name for name in others if name not in _WORLD and folder / name != tagged]
    if others:
        source.left.append(f"other files: {some(others)}")


def _tagged(folder: Path) -> Path:
    latest = folder / "latest"
    if not latest.exists():
        return folder
    with open(open_plain(latest), "rb") as file:
        tag = file.read(300).decode(errors="replace").strip()
    tagged = folder / basename(tag, latest, "the tag")
    if tagged.is_symlink() or not tagged.is_dir():
        raise UserError(f"{latest} names {tag}, and there is no such folder")
    return tagged


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the files of the pattern in the order of their ranks; raises UserError for tensor-parallel ones."""
    found: dict[int, Path] = {}
    for entry in sorted(folder.iterdir()):
        if match := pattern.fullmatch(entry.name):
            numbers = [int(group) for group in match.groups()]
            if numbers[-1] != 0:
                raise UserError(f"{entry}: it was written with tensor parallelism, which is not read here")
            rank = numbers[0]
            if rank in found:
                raise UserError(f"{folder}: rank {rank} is there twice, as {found[rank].name} and {entry.name}")
            found[rank] = entry
    if sorted(found) != list(range(len(found))):
        missing = min(set(range(len(found))) - set(found))
        raise UserError(f"{folder}: rank {missing} has no file like {next(iter(found.values())).name}")
    return [found[rank] for rank in sorted(found)]


def _mapping(file: TorchFile, content: Any, key: str | None = None) -> dict[Any, Any]:
    found = content.get(key) if key is not None and isinstance(content, dict) else content
    if not isinstance(found, dict):
        raise UserError(f"{file.path}: it has no {key or 'mapping'}, and is not what DeepSpeed's ZeRO writes")
    return found


def _stage(file: TorchFile, state: Mapping[Any, Any]) -> int:
    stage = state.get("zero_stage")
    stage = stage.args[0] if isinstance(stage, Made) and stage.args else stage
    if stage not in (1, 2, 3):
        raise UserError(f"{file.path}: it says no ZeRO stage that is read here (1, 2 or 3)")
    return int(stage)


def _shapes(file: TorchFile, head: Mapping[Any, Any]) -> list[dict[str, tuple[int, ...]]]:
    groups = head.get("param_shapes")
    groups = [groups] if isinstance(groups, dict) else groups
    for group in groups if isinstance(groups, list) else [None]:
        if not isinstance(group, dict) or not all(_is_shape(n, shape) for n, shape in group.items()):
            raise UserError(f"{file.path}: it has no param_shapes, as DeepSpeed writes them beside fp32 weights")
    return list(groups or [])


def _is_shape(name: Any, shape: Any) -> bool:
    return isinstance(name, str) and isinstance(shape, tuple) and len(shape) <= 64 and all(map(_is_size, shape))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _all_names(file: TorchFile, head: Mapping[Any, Any]) -> list[str]:
    names = [name for group in _shapes(file, head) for name in group]
    for key in ("frozen_param_shapes", "module", "shared_params"):
        names += [name for name in (head.get(key) or {}) if isinstance(name, str)]
    return list(dict.fromkeys(names))


class _Folder:
    """The listings of one checkpoint, put together."""

    def __init__(
        self,
        source: Source,
        stage: int,
        plain: dict[str, str],
        shapes: list[dict[str, tuple[int, ...]]],
        optims: list[TorchFile],
        states: list[dict[Any, Any]],
        files: list[TorchFile],
        heads: list[dict[Any, Any]],
    ):
        self.source, self.stage, self.plain, self.shapes = source, stage, plain, shapes
        self.optims, self.states, self.files, self.heads = optims, states, files, heads
        self.world_size = len(optims)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        self.masters = [self._flats(rank, states[rank].get(key)) for rank in range(self.world_size)]

    def _flats(self, rank: int, found: Any) -> list[View]:
        if not isinstance(found, list) or not found or not all(isinstance(view, View) for view in found):
            raise UserError(f"{self.optims[rank].path}: it has no fp32 weights, as ZeRO-{self.stage} keeps them")
        if self.stage < 3 and len(found) != len(self.shapes):
            raise UserError(f"{self.optims[rank].path}: it has other groups than {self.files[0].path.name}")
        return found

    def add(self) -> None:
        """Put the tensors into the source."""
        self._add_buffers_and_frozen()
        for index, shapes in enumerate(self._groups()):
            parts = self._parts("the fp32 weights", [self._of_group(groups, index) for groups in self.masters])
            found, end = self._cut(shapes, parts, "parameter", index)
            self._check_end(end, parts)
            for name, stored in found.items():
                self._add(name, stored)
        for alias, name in (self.heads[0].get("shared_params") or {}).items():
            if isinstance(name, str) and f"model/{self.plain.get(name)}" in self.source.tensors:
                full = f"model/{self.plain[alias]}"
                self.source.tensors.pop(full, None)
                self.source.aliases[full] = f"model/{self.plain[name]}"
        self._add_optimizer()

    def _add_buffers_and_frozen(self) -> None:
        head, file = self.heads[0], self.files[0]
        module = head.get("module")
        module = module if isinstance(module, dict) else {}
        buffers = head.get("buffer_names") or []
        trained = {name for group in self.shapes for name in group}
        shared = head.get("shared_params") or {}
        frozen, fragments = head.get("frozen_param_shapes") or {}, head.get("frozen_param_fragments") or {}
        self.source.buffers = {self.plain[name] for name in buffers if name in module}
        for name, view in module.items():
            if not isinstance(view, View) or name in trained or name in shared or name in frozen:
                continue
            if name in buffers:
                self._add(name, file.stored(view, "buffer", _widened(view.dtype)))
            elif self.stage < 3:  # ZeRO-1 keeps frozen parameters nowhere else, and its own converter loses them
                self._add(name, file.stored(view, "parameter", _widened(view.dtype)))
        for name, shape in frozen.items():
            if not _is_shape(name, shape) or not isinstance(fragments.get(name), View):
                raise UserError(f"{file.path}: the frozen parameter {str(name)[:80]!r} is not there")
            if self.stage < 3:
                view = fragments[name]
                if view.shape != shape:
                    raise UserError(f"{file.path}: the frozen parameter {name!r} is not of its shape")
                self._add(name, file.stored(view, "parameter", _widened(view.dtype)))
                continue
            views = [(head.get("frozen_param_fragments") or {}).get(name) for head in self.heads]
            if not all(isinstance(view, View) for view in views):
                raise UserError(f"{file.path}: the frozen parameter {name!r} is not on every rank")
            parts = FlatParts(f"the frozen parameter {name!r}", zip(self.files, cast(list[View], views), strict=True))
            spec = TensorSpec(shape, _widened(parts.dtype), "parameter")
            self._add(name, flat(spec, parts.dtype, parts.cut(0, spec.numel)))

    def _add(self, name: str, stored: Stored) -> None:
        self.source.tensors[f"model/{self.plain[name]}"] = stored

    def _groups(self) -> list[dict[str, tuple[int, ...]]]:
        """Return the parameters that are laid end to end: those of each group, under ZeRO-3 all of them."""
        if self.stage < 3:
            return self.shapes
        return [{name: shape for group in self.shapes for name, shape in group.items()}]

    def _of_group(self, flats: list[Any], index: int) -> list[Any]:
        """Return the flat tensors of one rank that hold one of `_groups`."""
        return flats if self.stage == 3 else flats[index : index + 1]

    def _parts(self, what: str, ranks: Sequence[Sequence[View]]) -> list[FlatParts]:
        """Return the flat tensors of each rank as one (ZeRO-3), or those of all ranks."""
        pairs = [[(file, view) for view in views] for file, views in zip(self.optims, ranks, strict=True)]
        if self.stage == 3:
            return [FlatParts(what, rank) for rank in pairs]
        return [FlatParts(what, [pair for rank in pairs for pair in rank])]

    def _cut(
        self, shapes: Mapping[str, tuple[int, ...]], parts: Sequence[FlatParts], role: str, group: int = 0
    ) -> tuple[dict[str, Stored], int]:
        """Cut the parameters out of flat tensors: one of all ranks, or (ZeRO-3) one for each rank.

        Returns them by name, and how many elements of each flat tensor they take.
        """
        paddings = self.states[0].get("param_alignment_paddings")
        paddings = paddings[group] if self.stage < 3 and isinstance(paddings, list) and group < len(paddings) else None
        if paddings is not None and (len(paddings) != len(shapes) or not all(_is_size(n) for n in paddings)):
            raise UserError(f"{self.optims[0].path}: its alignment paddings are not those of its parameters")
        found: dict[str, Stored] = {}
        offset = 0
        for place, (name, shape) in enumerate(shapes.items()):
            spec = TensorSpec(shape, "F32" if role == "parameter" else parts[0].dtype, role)
            if self.stage == 3:
                share, runs, missing = -(-spec.numel // self.world_size), [], spec.numel
                for part in parts:
                    runs += part.cut(offset, min(share, missing))
                    missing -= min(share, missing)
                offset += share
            else:
                runs = parts[0].cut(offset, spec.numel)
                offset += spec.numel + (paddings[place] if paddings else 0)
            found[name] = flat(spec, parts[0].dtype, runs)
        return found, offset

    def _check_end(self, offset: int, parts: Sequence[FlatParts]) -> None:
        # ZeRO-1 and 2 end a group with an alignment of its own, which the ranks may or may not have saved
        step = 1 if self.stage == 3 else 2 * self.world_size
        for part in parts:
            if -(-offset // step) != -(-part.numel // step):
                raise UserError(
                    f"{self.optims[0].path}: its parameters take {offset:,} elements of {part.what}, and there are "
                    f"{part.numel:,}: the files do not belong together"
                )

    # The optimizer

    def _add_optimizer(self) -> None:
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        found = [_by_group(state.get(key)) for state in self.states]
        if any(groups is None for groups in found) or not found[0]:
            self.source.left.append(
                "the optimizer's state: it is not in the files, or not as torch's optimizers keep it"
            )
            return
        ranks: list[dict[int, dict[str, Any]]] = [groups for groups in found if groups is not None]
        tensors: dict[tuple[str, str], Stored] = {}
        values: dict[tuple[str, str], Any] = {}
        keys = {index: list(entries) for index, entries in ranks[0].items()}
        if any({index: list(entries) for index, entries in rank.items()} != keys for rank in ranks):
            raise UserError(f"{self.optims[0].path}: the ranks hold different optimizer states")
        for index, shapes in enumerate(self._groups()):
            places = sorted(keys) if self.stage == 3 else [index]
            for name in dict.fromkeys(name for place in places for name in keys.get(place, ())):
                views = [[rank.get(place, {}).get(name) for place in places] for rank in ranks]
                if not isinstance(views[0][0], View) or len(views[0][0].shape) != 1:
                    self._same_for_all(name, views[0][0], shapes, tensors, values)
                    continue
                lean = [self._of_group(groups, index) for groups in self.masters]
                parts = self._parts(
                    f"the optimizer's {name}", [_cut_to(*pair) for pair in zip(views, lean, strict=True)]
                )
                for parameter, stored in self._cut(shapes, parts, "optimizer", index)[0].items():
                    tensors[parameter, name] = stored
        add_by_name(self.source, tensors, values, _param_groups(self.states[0].get(key)))

    def _same_for_all(
        self,
        key: str,
        value: Any,
        names: Mapping[str, Any],
        tensors: dict[tuple[str, str], Stored],
        values: dict[tuple[str, str], Any],
    ) -> None:
        """Give every parameter what its flat tensor has once: the count of steps."""
        for name in names:
            if isinstance(value, View):
                tensors[name, key] = self.optims[0].stored(value, "optimizer")
            elif key == "step" and isinstance(value, int | float):
                tensors[name, key] = number(value)
            else:
                values[name, key] = value


def _widened(dtype: str) -> str:
    """Return the dtype of fp32 weights for what was kept in fewer bits."""
    return "F32" if dtype in ("F16", "BF16") else dtype


def _cut_to(views: Sequence[Any], others: Sequence[View]) -> list[View]:
    """Return flat tensors of an optimizer's state without the padding that those of the weights lack."""
    found = []
    if len(views) != len(others):
        raise UserError("an optimizer's state is cut otherwise than the weights that it belongs to")
    for view, other in zip(views, others, strict=True):
        if not isinstance(view, View) or len(view.shape) != 1 or view.shape[0] < other.shape[0]:
            raise UserError("an optimizer's state has fewer elements than the weights that it belongs to")
        found.append(View(view.storage, view.dtype, view.offset, other.shape, view.strides))
    return found


def _by_group(state: Any) -> dict[int, dict[str, Any]] | None:
    """Return {group or flat tensor: entries} of a torch optimizer's state, or of DeepSpeed's elastic list of it."""
    if isinstance(state, dict):
        state = state.get("state")
    elif isinstance(state, list):
        state = dict(enumerate(state))
    if not isinstance(state, dict) or not all(isinstance(entries, dict) for entries in state.values()):
        return None
    return state if all(type(index) is int for index in state) else None


def _param_groups(state: Any) -> list[dict[str, Any]]:
    groups = state.get("param_groups") if isinstance(state, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
