"""Folders of DeepSpeed's save_checkpoint, for ZeRO-1, 2 and 3.

The fp32 master weights and the optimizer's state are flat tensors, of which each rank holds a part. ZeRO-1 and 2 lay
the parameters of a group end to end, each followed by its alignment padding, and cut that among the ranks. ZeRO-3 cuts
each parameter among the ranks and lays one rank's parts of all of them end to end, over one or more flat tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from distrain.checkpoints.files import open_descriptor
from distrain.checkpoints.foreign.common import FlatParts, TorchFile, basename, canonical_names, number
from distrain.checkpoints.foreign.optimizers import add_by_name
from distrain.checkpoints.foreign.pickles import Made, View
from distrain.checkpoints.format import TensorSpec
from distrain.checkpoints.sources import Source, Stored, flat
from distrain.config.registry import formats
from distrain.system.errors import UserError, some

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
    "global_steps", "skipped_steps", "ds_config", "ds_version", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "optimizer",
}  # fmt: skip
_WORLD = ("latest", "zero_to_fp32.py", "zero_to_torch.py")


def is_folder(folder: Path) -> bool:
    """Whether this is a folder of save_checkpoint, or one of its tags' folders."""
    if not folder.is_dir():
        return False
    return (folder / "latest").exists() or any(_is_deepspeeds(entry.name) for entry in folder.iterdir())


def _is_deepspeeds(name: str) -> bool:
    return bool(_OPTIM.fullmatch(name) or _ZERO3.fullmatch(name) or _MODEL.fullmatch(name))


@formats.register(
    "deepspeed", about="a folder of DeepSpeed's save_checkpoint, ZeRO-1, 2 or 3", order=1, found=is_folder
)
def open_folder(source: Source, folder: Path, *, trust: bool) -> None:
    """Add the fp32 weights, buffers and optimizer state of the tag that `latest` names."""
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
    found = _Folder(source, stage, optims, states, [TorchFile(source, path, trust=trust) for path in models])
    found.add()
    head, file = found.heads[0], found.files[0]
    source.description = f"DeepSpeed ZeRO-{stage} of {count} rank{'s' * (count != 1)}"
    if isinstance(head.get("ds_version"), str):
        source.description += f", by DeepSpeed {head['ds_version'][:20]}"
    steps, missed = head.get("global_steps"), head.get("skipped_steps")
    if type(steps) is int and 0 <= steps < 10**18:
        source.steps["global_steps"] = steps
        # neither its optimizer nor its schedule counts those with an overflow
        if type(missed) is int and 0 < missed <= steps:
            source.steps["global_steps - skipped_steps"] = steps - missed
    rest = [str(key) for key, value in head.items() if key not in _USED and value not in (None, 0, {}, [])]
    if rest:
        source.skipped.append(f"{file.path.name}: {some(rest, 12)}")
    if isinstance(states[0].get("loss_scaler"), Made):
        source.skipped.append("the state of the loss scaler")
    others = [entry.name for entry in sorted({*tagged.iterdir(), *folder.iterdir()}) if not _is_deepspeeds(entry.name)]
    others = [name for name in others if name not in _WORLD and folder / name != tagged]
    if others:
        source.skipped.append(f"other files: {some(others)}")


def _tagged(folder: Path) -> Path:
    latest = folder / "latest"
    if not latest.exists():
        return folder
    with open(open_descriptor(latest), "rb") as file:
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
        raise UserError(f"{file.path}: found {str(stage)[:40]!r} as its ZeRO stage, expected 1, 2 or 3")
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


class _Folder:
    """The listings of one checkpoint, of all ranks."""

    def __init__(
        self,
        source: Source,
        stage: int,
        optims: list[TorchFile],
        states: list[dict[Any, Any]],
        files: list[TorchFile],
    ):
        self.source, self.stage, self.optims, self.states, self.files = source, stage, optims, states, files
        self.heads = [_mapping(file, file.root) for file in files]
        head = self.heads[0]
        self.shapes = _shapes(files[0], head)
        names = [name for group in self.shapes for name in group]
        for key in ("frozen_param_shapes", "module", "shared_params"):
            names += [name for name in (head.get(key) or {}) if isinstance(name, str)]
        self.canonical = canonical_names(source, dict.fromkeys(names))
        self.world_size = len(optims)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        self.masters = [self._flats(rank, states[rank].get(key)) for rank in range(self.world_size)]

    def _flats(self, rank: int, found: Any) -> list[View]:
        if not isinstance(found, list) or not found or not all(isinstance(view, View) for view in found):
            raise UserError(f"{self.optims[rank].path}: it has no fp32 weights, as ZeRO-{self.stage} keeps them")
        if self.stage < 3 and len(found) != len(self.shapes):
            raise UserError(f"{self.optims[rank].path}: its groups are not those of {self.files[0].path.name}")
        return found

    def add(self) -> None:
        """Put the tensors into the source."""
        self._add_buffers_and_frozen()
        for index, shapes in enumerate(self._groups()):
            parts = self._parts("the fp32 weights", [self._of_group(groups, index) for groups in self.masters])
            for name, stored in self._cut(shapes, parts, "parameter", index).items():
                self._add(name, stored)
        for alias, name in (self.heads[0].get("shared_params") or {}).items():
            if isinstance(name, str) and f"model/{self.canonical.get(name)}" in self.source.tensors:
                full = f"model/{self.canonical[alias]}"
                self.source.tensors.pop(full, None)
                self.source.aliases[full] = f"model/{self.canonical[name]}"
        self._add_optimizer()

    def _add_buffers_and_frozen(self) -> None:
        head, file = self.heads[0], self.files[0]
        module = head.get("module")
        module = module if isinstance(module, dict) else {}
        buffers = head.get("buffer_names") or []
        trained = {name for group in self.shapes for name in group}
        shared = head.get("shared_params") or {}
        frozen, fragments = head.get("frozen_param_shapes") or {}, head.get("frozen_param_fragments") or {}
        self.source.buffers = {self.canonical[name] for name in buffers if name in module}
        for name, view in module.items():
            if not isinstance(view, View) or name in trained or name in shared or name in frozen:
                continue
            if name in buffers:
                self._add(name, file.stored(view, "buffer", _widened(view.dtype)))
            elif self.stage < 3:  # the only place of ZeRO-1's frozen parameters, which its own converter loses
                self._add(name, file.stored(view, "parameter", _widened(view.dtype)))
        for name, shape in frozen.items():
            view = fragments.get(name)
            if not _is_shape(name, shape) or not isinstance(view, View) or (self.stage < 3 and view.shape != shape):
                raise UserError(f"{file.path}: the frozen parameter {str(name)[:80]!r} is missing or of another shape")
            if self.stage < 3:
                self._add(name, file.stored(view, "parameter", _widened(view.dtype)))
                continue
            views = [(head.get("frozen_param_fragments") or {}).get(name) for head in self.heads]
            if not all(isinstance(view, View) for view in views):
                raise UserError(f"{file.path}: the frozen parameter {name!r} is not on every rank")
            parts = FlatParts(f"the frozen parameter {name!r}", zip(self.files, cast(list[View], views), strict=True))
            spec = TensorSpec(shape, _widened(parts.dtype), "parameter")
            self._add(name, flat(spec, parts.dtype, parts.cut(0, spec.numel)))

    def _add(self, name: str, stored: Stored) -> None:
        self.source.tensors[f"model/{self.canonical[name]}"] = stored

    def _groups(self) -> list[dict[str, tuple[int, ...]]]:
        """Return the parameters that lie end to end: those of each group, under ZeRO-3 all of them."""
        if self.stage < 3:
            return self.shapes
        return [{name: shape for group in self.shapes for name, shape in group.items()}]

    def _of_group(self, flats: list[Any], index: int) -> list[Any]:
        """Return one rank's flat tensors of one of `_groups`."""
        return flats if self.stage == 3 else flats[index : index + 1]

    def _parts(self, what: str, ranks: Sequence[Sequence[View]]) -> list[FlatParts]:
        """Join the flat tensors of each rank (ZeRO-3), or those of all ranks."""
        pairs = [[(file, view) for view in views] for file, views in zip(self.optims, ranks, strict=True)]
        if self.stage == 3:
            return [FlatParts(what, rank) for rank in pairs]
        return [FlatParts(what, [pair for rank in pairs for pair in rank])]

    def _cut(
        self, shapes: Mapping[str, tuple[int, ...]], parts: Sequence[FlatParts], role: str, group: int = 0
    ) -> dict[str, Stored]:
        """Cut the parameters out of flat tensors: one of all ranks, or (ZeRO-3) one for each rank."""
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
        # ZeRO-1 and 2 end a group with an alignment of its own, which the ranks may or may not have saved
        step = 1 if self.stage == 3 else 2 * self.world_size
        for part in parts if role == "parameter" else ():
            if -(-offset // step) != -(-part.numel // step):
                raise UserError(
                    f"{self.optims[0].path}: its parameters take {offset:,} elements of {part.what}, and there are "
                    f"{part.numel:,}: the files do not belong together"
                )
        return found

    def _add_optimizer(self) -> None:
        state_key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        ranks = [groups for state in self.states if (groups := _by_group(state.get(state_key))) is not None]
        if len(ranks) < self.world_size:
            self.source.skipped.append(
                "the optimizer's state: it is not in the files, or not as torch's optimizers keep it"
            )
            return
        tensors: dict[tuple[str, str], Stored] = {}
        values: dict[tuple[str, str], Any] = {}
        keys = {index: list(entries) for index, entries in ranks[0].items()}
        if any({index: list(entries) for index, entries in rank.items()} != keys for rank in ranks):
            raise UserError(f"{self.optims[0].path}: the ranks hold different optimizer states")
        for index, shapes in enumerate(self._groups()):
            places = sorted(keys) if self.stage == 3 else [index]
            for key in dict.fromkeys(key for place in places for key in keys.get(place, ())):
                views = [[rank.get(place, {}).get(key) for place in places] for rank in ranks]
                value = views[0][0]
                if isinstance(value, View) and len(value.shape) == 1:
                    weights = [self._of_group(groups, index) for groups in self.masters]
                    cut = [_cut_to(*pair) for pair in zip(views, weights, strict=True)]
                    found = self._cut(shapes, self._parts(f"the optimizer's {key}", cut), "optimizer", index)
                    tensors |= {(name, key): stored for name, stored in found.items()}
                # every parameter gets what its flat tensor has once: the count of steps
                elif isinstance(value, View):
                    tensors |= {(name, key): self.optims[0].stored(value, "optimizer") for name in shapes}
                elif key == "step" and isinstance(value, int | float):
                    tensors |= {(name, key): number(value) for name in shapes}
                else:
                    values |= {(name, key): value for name in shapes}
        state = self.states[0].get(state_key)
        settings = state.get("param_groups") if isinstance(state, dict) else None
        settings = [group for group in settings if isinstance(group, dict)] if isinstance(settings, list) else []
        # each flat tensor has the number of its group of parameters
        names = {index: list(shapes) for index, shapes in enumerate(self.shapes)}
        add_by_name(self.source, tensors, values, [_named(group, names) for group in settings])


def _named(group: Mapping[str, Any], names: Mapping[int, list[str]]) -> dict[str, Any]:
    flats = group.get("params")
    flats = flats if isinstance(flats, list) else []
    return {**group, "params": [name for flat in flats if isinstance(flat, int) for name in names.get(flat, ())]}


def _widened(dtype: str) -> str:
    """Return F32 for weights that were kept in 16 bits."""
    return "F32" if dtype in ("F16", "BF16") else dtype


def _cut_to(views: Sequence[Any], others: Sequence[View]) -> list[View]:
    """Cut the flat tensors of an optimizer's state, which may be padded, to the lengths of the weights'."""
    found = []
    if len(views) != len(others):
        raise UserError("an optimizer's state is not cut as its weights are")
    for view, other in zip(views, others, strict=True):
        if not isinstance(view, View) or len(view.shape) != 1 or view.shape[0] < other.shape[0]:
            raise UserError("an optimizer's state has fewer elements than its weights")
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
