"""The state of training as flat ranges of named tensors, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from distrain.checkpoint import Frozen, Piece, Reader, TensorSpec
from distrain.config import UserError
from distrain.networks.memory import local
from distrain.optim import Ema, Optimizers, canonical_name, classes_of, parts_of
from distrain.parallel.contents import (
    Contents,
    contents,
    separate_buffers,
)
from distrain.parallel.frozen import USING, check_frozen
from distrain.parallel.mesh import Mesh
from distrain.parallel.nested import (
    Unstorable,
    bytes_of,
    encode,
    equal,
    is_plain,
)
from distrain.parallel.optimizer_restoring import MigrationPlanner, OptimizerRestorer
from distrain.parallel.optimizer_state import (
    Kept,
    check_trained,
    group_names,
    settings_of,
    shared_memory,
    state_of,
    unlike_stated,
)
from distrain.parallel.shards import LocalTensor, Shard, replicated, whole
from distrain.parallel.snapshot import Snapshot, pieces_of, share_of
from distrain.parallel.stored import (
    check_fit,
    encoded_values,
    fill_all,
    specs_of,
    task_notes,
    without_frozen,
)
from distrain.system.collector import no_collection
from distrain.system.numbers import a_kind


@dataclass
class TrainingState:
    """What a checkpoint holds: everything that is not computed from the recipe and the step."""

    model: nn.Module
    """Unwrapped, with canonical names."""
    optimizer: torch.optim.Optimizer | Optimizers | None
    """Of torch, unwrapped, or several; None for a model that is only used."""
    ema: Ema | None
    shard: Callable[[nn.Parameter], Shard] = whole
    """Returns what this rank holds of a parameter."""
    groups: list[list[str]] | None = None
    """The names of the parameters in the optimizer's groups, where those hold something else in their place."""
    migrate: MigrationPlanner | None = None
    """Returns what the optimizer takes over from the state of another; None takes over that of its own class alone."""
    stepping: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Gives the context in which the optimizer's groups hold what it trains."""

    def __post_init__(self) -> None:
        self._built = [settings_of(group) for group in self.optimizer.param_groups] if self.optimizer else []
        self._at_start = {
            name: spec
            for name, spec in specs_of(self._held_model(contents(self.model))).items()
            if spec.role != "state"
        }

        self.frozen: Frozen | None = None
        """What checkpoints refer to."""
        self._versions: dict[str, int] = {}

    def refer(self, frozen: Frozen | None) -> None:
        """Have checkpoints refer to frozen parameters, which keep the values that they have now."""
        self.frozen = frozen
        self._versions = self._versions_now()

    def _versions_now(self) -> dict[str, int]:
        """Return how often each frozen parameter was written to in place. ZeRO-3 alone writes to its own parts."""
        if self.frozen is None:
            return {}
        parameters = self.model.named_parameters()
        return {
            name: self.shard(parameter).values._version
            for name, parameter in parameters
            if f"model/{name}" in self.frozen.tensors and not hasattr(parameter, "ds_tensor")
        }

    def _stored(self, held: dict[str, LocalTensor]) -> dict[str, LocalTensor]:
        """Return what checkpoints store. Raises UserError where a parameter that they refer to was changed."""
        if self.frozen is None:
            return held
        now = self._versions_now()
        if changed := [name for name, version in now.items() if self._versions.get(name) != version]:
            raise UserError(
                f"the model's code has changed frozen parameters in place ({', '.join(changed[:3])}); checkpoints "
                "would lose that, as they refer to the initial weights. Set checkpoint.frozen to store"
            )
        return {name: each for name, each in held.items() if name not in self.frozen.tensors}

    def _groups(self) -> list[list[str]]:
        assert self.optimizer is not None
        return self.groups if self.groups is not None else group_names(self.model, self.optimizer)

    # ----------------------------------------------------------------------------------------------------------------
    # What there is

    def held(self) -> dict[str, LocalTensor]:
        """Return what this rank holds of every tensor, in a fixed order: the same names on every rank.

        Raises UserError naming what a checkpoint cannot hold.
        """
        return self._look()[0]

    def _look(self) -> tuple[dict[str, LocalTensor], Contents, Kept | None]:
        """Return what this rank holds of every tensor, and what else there is of the model and of the optimizer."""
        shards: dict[str, Shard] = {}
        found = contents(self.model)
        held, kept = self._held_model(found, shards), None
        if self.optimizer is not None:
            kept = self._kept(shards)
            held |= kept.held
        if self.ema is not None:
            by_name = {canonical_name(name): shard for name, shard in shards.items()}
            for name, average in self.ema.tensors().items():
                of = by_name.get(name)
                held[f"ema/{name}"] = (
                    LocalTensor("ema", of.shape, of.start, local(average), of.replicated)
                    if of is not None
                    else replicated("ema", average)
                )
        return held, found, kept

    def _held_model(self, found: Contents, shards: dict[str, Shard] | None = None) -> dict[str, LocalTensor]:
        """Return what this rank holds of the model, and note the `shards` of its parameters by name."""
        held: dict[str, LocalTensor] = {}
        seen: set[int] = set()
        for name, tensor in found.own.items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(tensor, nn.Parameter):
                shard = self.shard(tensor)
                if shards is not None:
                    shards[name] = shard
                held[f"model/{name}"] = LocalTensor(
                    "parameter", shard.shape, shard.start, shard.values, shard.replicated
                )
            else:
                held[f"model/{name}"] = replicated("buffer", tensor.detach())
        for name, tensor in found.tensors.items():
            held[f"model/{name}"] = replicated("state", tensor.detach())
        for name, tensor in encoded_values(found)[1].items():
            held[f"state/{name}"] = replicated("state", tensor)
        # exports hold these in the place of the model's own
        for name, tensor in found.changed.items():
            held[f"exported/{name}"] = replicated("state", tensor.detach())
        if found.changed and self.ema is not None:
            with self.ema.applied():
                for name, tensor in contents(self.model).changed.items():
                    held[f"exported-ema/{name}"] = replicated("state", tensor.detach().clone())
        return held

    def _kept(self, shards: Mapping[str, Shard]) -> Kept:
        """Return what the optimizer keeps; raises UserError naming all that a checkpoint cannot hold."""
        assert self.optimizer is not None
        kept, problems = Kept(), []
        name_of, state = classes_of(self.optimizer), state_of(self.optimizer)
        entries: dict[int, str] = {}
        for name, shard in shards.items():
            if shard.entry is None:
                continue
            entries[id(shard.entry)] = name
            of_parameter = state.get(shard.entry, {})
            if not isinstance(of_parameter, Mapping):
                problems.append(f"the state of {name} is {a_kind(of_parameter)}, and not a dict")
                continue
            try:
                kept.add(name, shard, of_parameter)
            except Unstorable as error:
                problems.append(f"{error}, in the state of {name}")
        if self.groups is None:
            check_trained(self.model, self.optimizer, entries)
        for key, value in state.items():
            if isinstance(key, Tensor):
                if id(key) not in entries:
                    problems.append(f"state under a tensor of shape {tuple(key.shape)} that is none of its parameters")
            elif type(key) is not str:
                problems.append(f"state under the key {str(key)[:60]}, {a_kind(key)}; expected text")
            else:
                kept.encode(kept.others, key, value, "optimizer-key", problems)
        for index, (group, built) in enumerate(zip(self.optimizer.param_groups, self._built, strict=True)):
            changed: dict[str, Any] = {}
            nested: dict[str, Any] = {key: {"gone": True} for key in built.keys() - group.keys()}
            for key, value in group.items():
                # the learning rate is the schedule's
                if key in ("params", "lr") or (key in built and equal(value, built[key])):
                    continue
                if is_plain(value):
                    changed[key] = value
                else:
                    kept.encode(nested, key, value, f"optimizer-group/{index}", problems)
            kept.groups.append(changed)
            kept.nested_groups.append(nested)
        if problems:
            raise UserError(
                f"{name_of} keeps what a checkpoint cannot hold, so a resumed run would not be the same:\n  - "
                + "\n  - ".join(problems)
                + "\nHave it keep tensors, numbers, text, None, or lists, tuples and dicts of such, or use another "
                "optimizer (optim.name)"
            )
        return kept

    def check(self) -> dict[str, str]:
        """Hold what a checkpoint would hold against what the optimizer says its state is: after the first step.

        Returns a digest of each value that is to be the same on every rank. Raises UserError naming what would be lost.
        """
        self.specs()
        digests = self.digests_of_extra()
        if self.optimizer is None:
            return digests
        problems = [each for part in parts_of(self.optimizer).values() for each in unlike_stated(part, self.stepping)]
        problems += shared_memory(self.optimizer, self._shards())
        if problems:
            raise UserError(
                f"the state of {classes_of(self.optimizer)} cannot be saved and taken back as it is:\n  - "
                + "\n  - ".join(problems)
            )
        kept = self._kept(self._shards())
        for index, (changed, nested) in enumerate(zip(kept.groups, kept.nested_groups, strict=True)):
            group = self.optimizer.param_groups[index]
            digests |= {f"optim group {index}: {key}": _digest(group.get(key)) for key in (*changed, *nested)}
        state = state_of(self.optimizer)
        return digests | {f"optim state: {key}": _digest(state[key]) for key in kept.others}

    def digests_of_extra(self) -> dict[str, str]:
        """Return a digest of each value of the model, and its task, that is no tensor of a module by its name."""
        found = contents(self.model)
        encoded_values(found)  # names what cannot be held
        return {name: _digest(value) for name, value in {**found.values, **found.tensors}.items()}

    def _shards(self) -> dict[str, Shard]:
        """Return the shards of all parameters by their first name."""
        return {name: self.shard(parameter) for name, parameter in self.model.named_parameters()}

    def snapshot(self) -> Snapshot:
        """Return what a checkpoint of this moment holds, looked through once.

        Raises UserError where parameters or buffers are not those that the model was built with: a resumed run builds
        it as it was at the start; and naming what a checkpoint cannot hold.
        """
        with no_collection():
            held, found, kept = self._look()
            specs = specs_of(held)
            self._check_model(specs)
            scalars = {} if kept is None else self._scalars(found, kept)
            held = self._stored(held)
            return Snapshot(held, {name: specs[name] for name in held}, scalars, _aliases(found), self.frozen)

    def aliases(self) -> dict[str, str]:
        """Return {alias: name} for tensors of the model that have several names."""
        return _aliases(contents(self.model))

    def specs(self) -> dict[str, TensorSpec]:
        """Return shape, dtype and role of every full tensor; raises UserError as `snapshot`."""
        specs = specs_of(self.held())
        self._check_model(specs)
        return specs

    def _check_model(self, specs: dict[str, TensorSpec]) -> None:
        now = {name: spec for name, spec in specs.items() if name.startswith("model/") and spec.role != "state"}
        if now == self._at_start:
            return
        names = [n for n in sorted(now.keys() | self._at_start.keys()) if now.get(n) != self._at_start.get(n)]
        shown = "\n  - ".join(
            f"{name.removeprefix('model/')}: {_of_spec(self._at_start.get(name))} at the start, "
            f"{_of_spec(now.get(name))} now"
            for name in names[:10]
        )
        late = any(name not in self._at_start for name in names)
        raise UserError(
            "the model's parameters or buffers are others than it was built with, and a run that resumes builds it "
            f"as at the start:\n  - {shown}\nKeep their shapes and dtypes, or register what changes with "
            f"persistent=False{'. Make layers in __init__, or take lazy ones (nn.LazyLinear)' * late}"
        )

    def scalars(self) -> dict[str, Any]:
        """Return what is not a tensor: of the optimizer, of its groups (all, for the record), and of the model."""
        return self._scalars(contents(self.model), self._kept(self._trained()))

    def settings(self) -> list[tuple[list[str], dict[str, Any]]]:
        """Return the optimizer's groups, each with the names of its parameters."""
        assert self.optimizer is not None
        return list(zip(self._groups(), self.optimizer.param_groups, strict=True))

    def _scalars(self, found: Contents, kept: Kept) -> dict[str, Any]:
        assert self.optimizer is not None, "scalars are those of training"
        groups = [
            {key: value for key, value in group.items() if is_plain(value)} | {"params": names}
            for group, names in zip(self.optimizer.param_groups, self._groups(), strict=True)
        ]
        scalars: dict[str, Any] = {
            "optimizer": classes_of(self.optimizer),
            "optimizer_values": kept.values,
            "optimizer_groups": groups,
            # what an optimizer itself has changed in its groups is state (some count steps there); the rest is the
            # recipe's
            "optimizer_group_values": kept.groups,
        }
        # what few have, and older checkpoints do not
        renamed = set(found.renamed.values())
        parts = self.optimizer.parts if isinstance(self.optimizer, Optimizers) else {}
        further = {
            "optimizers": {name: type(part).__name__ for name, part in parts.items()},
            "optimizer_nested": kept.nested,
            "optimizer_group_nested": kept.nested_groups if any(kept.nested_groups) else [],
            "optimizer_keys": kept.others,
            "model_state": encoded_values(found)[0],
            "model_renamed": sorted(f"model/{name}" for name in renamed - self.model.state_dict().keys())
            if renamed
            else [],
        }
        return scalars | {key: value for key, value in further.items() if value}

    def _trained(self) -> dict[str, Shard]:
        """Return the shards of the parameters that are trained, in the model's order."""
        trained = {name for names in self._groups() for name in names}
        shards = {name: self.shard(p) for name, p in self.model.named_parameters() if name in trained}
        return {name: shard for name, shard in shards.items() if shard.entry is not None}

    # ----------------------------------------------------------------------------------------------------------------
    # To a checkpoint

    def pieces(self, mesh: Mesh) -> Iterator[Piece]:
        """Yield the flat ranges that a rank writes, which are those of no other rank."""
        return pieces_of(self.held(), mesh)

    def share(self, mesh: Mesh) -> int:
        """Return the bytes of the ranges that a rank writes, or a few more."""
        return share_of(self._stored(self.held()), mesh)

    # ----------------------------------------------------------------------------------------------------------------
    # From a checkpoint

    def restore(self, reader: Reader) -> list[str]:
        """Fill this rank's part of model, optimizer and average from a checkpoint; returns notes for the user.

        Raises UserError naming all that does not fit. Speaks to no other rank.
        """
        with no_collection(), torch.no_grad():
            return self._restore(reader)

    def _restore(self, reader: Reader) -> list[str]:
        held = without_frozen(reader, self.held())
        held = {name: each for name, each in held.items() if each.role != "optimizer"}
        roles = ("parameter", "buffer") if self.ema is None else ("parameter", "buffer", "ema")
        check_fit(reader, specs_of(held), roles)
        fill_all(self.model, reader, {name: (each, name) for name, each in held.items() if each.role in roles})
        notes = [*self._restore_optimizer(reader), *task_notes(self.model, reader)]
        if self.ema is None and any(spec.role == "ema" for spec in reader.manifest.specs.values()):
            notes.append("the stored average of the weights is not loaded: train.ema is null")
        return notes

    def _restore_optimizer(self, reader: Reader) -> list[str]:
        assert self.optimizer is not None, "only training is restored"
        restorer = OptimizerRestorer(
            reader, self.optimizer, self._trained(), self._groups(), self._built, self.migrate, self.stepping
        )
        return restorer.restore()


def _aliases(found: Contents) -> dict[str, str]:
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in found.own.items():
        if id(tensor) in first_name:
            aliases[f"model/{name}"] = first_name[id(tensor)]
        else:
            first_name[id(tensor)] = f"model/{name}"
    return aliases | {f"model/{n}": first_name[id(found.own[own])] for n, own in found.renamed.items()}


def _of_spec(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.role} {spec.dtype} {list(spec.shape)}"


def _digest(value: Any) -> str:
    found: dict[str, Tensor] = {}
    digest = xxhash.xxh3_64(json.dumps(encode(value, "", found)).encode())
    for tensor in found.values():
        digest.update(bytes_of(tensor).numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, reader: Reader, *, averaged: bool) -> None:
    """Fill a model from a checkpoint, with its averaged weights where `averaged`. Raises UserError as `restore`.

    Where the checkpoint refers to frozen weights, the model was built with its initial weights, which are checked.
    """
    separate_buffers(model)
    if reader.manifest.frozen is not None:
        check_frozen(model, reader.manifest.frozen, reader.path, USING)
    held = without_frozen(reader, TrainingState(model, None, None).held())
    check_fit(reader, specs_of(held), ("parameter", "buffer"))
    wanted = {}
    for name, each in held.items():
        if each.role in ("parameter", "buffer"):
            average = name.replace("model/", "ema/", 1)
            wanted[name] = (each, average if averaged and average in reader.manifest.tensors else name)
    fill_all(model, reader, wanted)
