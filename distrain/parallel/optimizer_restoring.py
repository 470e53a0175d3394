"""An optimizer's state from a checkpoint: which of it is taken, where it goes, and the values of the groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distrain.checkpoint import Reader, TensorSpec
from distrain.config import UserError
from distrain.networks.memory import local
from distrain.networks.weights import torch_dtype
from distrain.optim import OPTIMIZER, Optimizers, StateMigration, parts_of
from distrain.parallel.nested import decode, equal, names_in
from distrain.parallel.optimizer_state import Entry, load_state, of_part, state_of
from distrain.parallel.shards import Shard, range_of
from distrain.parallel.stored import fill, read_tensor

MigrationPlanner = Callable[..., StateMigration]
"""From the class that left an optimizer's state, the names in it, and the name of one of several optimizers: what is
taken over."""


@dataclass(frozen=True)
class OptimizerRestorer:
    """Fills an optimizer from a checkpoint. Speaks to no other rank."""

    reader: Reader
    optimizer: torch.optim.Optimizer | Optimizers
    trained: Mapping[str, Shard]
    """The shards of the parameters that are trained, in the model's order."""
    groups: Sequence[Sequence[str]]
    """The names of the parameters in the optimizer's groups."""
    built: Sequence[Mapping[str, Any]]
    """The values of its groups, as they were built."""
    migrate: MigrationPlanner | None
    """Returns what the optimizer takes over from the state of another; None takes over that of its own class alone."""
    stepping: Callable[[], AbstractContextManager[Any]]
    """Gives the context in which the optimizer's groups hold what it trains."""

    def restore(self) -> list[str]:
        """Fill this rank's part of the optimizer; returns notes for the user. Raises UserError for what cannot."""
        reader, manifest, optimizer, trained = self.reader, self.reader.manifest, self.optimizer, self.trained
        stored: dict[str, dict[str, TensorSpec]] = {}
        for name, spec in manifest.specs.items():
            if name.startswith("optimizer/"):
                parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
                stored.setdefault(parameter, {})[key] = spec
        values: dict[str, dict[str, Any]] = manifest.scalars["optimizer_values"]
        nested: dict[str, dict[str, Any]] = manifest.scalars.get("optimizer_nested", {})
        within = {name: set(names_in(held)) for name, held in nested.items()}
        keys_of = {name: {key for key in keys if key not in within.get(name, ())} for name, keys in stored.items()}
        for kept in (values, nested):
            for name, held in kept.items():
                keys_of.setdefault(name, set()).update(held)
        taken_of, notes = self._taken(keys_of)
        if lost := sorted((stored.keys() | values.keys() | nested.keys()) - trained.keys()):
            raise UserError(
                f"{reader.path} holds optimizer state for {len(lost)} parameters that this recipe does not train, "
                f"such as {', '.join(lost[:3])}; set optim.freeze as it was"
            )
        # a state that has its parameter's shape everywhere is one number for each weight, and is cut as the weights are
        elementwise = {key for specs in stored.values() for key in specs}
        elementwise -= {
            key for name, specs in stored.items() for key, s in specs.items() if s.shape != trained[name].shape
        }
        entries: dict[int, Entry] = {}
        for name, shard in trained.items():
            assert shard.entry is not None, name
            entry = entries.setdefault(id(shard.entry), Entry(shard.entry))
            taken = taken_of.get(name, frozenset())
            for key, spec in stored.get(name, {}).items():
                inside = key in within.get(name, ())
                if not inside and key not in taken:
                    continue
                where = f"optimizer/{name}/{key}"
                state = entry.inner if inside else entry.state
                if key in elementwise:
                    if key not in state:
                        state[key] = torch.zeros_like(
                            entry.key.detach(), dtype=torch_dtype(spec.dtype), memory_format=torch.preserve_format
                        )
                    fill(range_of(local(state[key]), shard), reader, where, shard.start)
                    continue
                value = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
                fill(value, reader, where)
                entry.take(state, key, value, name)
            for key, plain in values.get(name, {}).items():
                if key in taken:
                    entry.take(entry.state, key, plain, name)
            for key, held in nested.get(name, {}).items():
                if key in taken:
                    entry.take(entry.nested, key, held, name)
        for entry in entries.values():
            entry.put_together()
        others = {
            key: decode(held, self._reads("optimizer-key"))
            for key, held in manifest.scalars.get("optimizer_keys", {}).items()
        }
        with self.stepping():
            handed = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert entries.keys() <= handed, "what is trained is in the optimizer's groups"
            for name, part in parts_of(optimizer).items():
                load_state(part, {key: each for key, each in entries.items() if each.state}, of_part(name, others))
            loaded = state_of(optimizer)
            for entry in entries.values():
                entry.make_exact(loaded.get(entry.key, {}))
            self._restore_groups()
        return notes

    def _reads(self, prefix: str) -> Callable[[str, bool], Tensor]:
        """Return what reads the tensors of an encoded value, and puts them where the trained ones are."""
        entries = (shard.entry for shard in self.trained.values() if shard.entry is not None)
        device = next((entry.device for entry in entries), torch.device("cpu"))

        def read(name: str, on_host: bool) -> Tensor:
            value = read_tensor(self.reader, f"{prefix}/{name}")
            return value if on_host else value.to(device)

        return read

    def _restore_groups(self) -> None:
        scalars = self.reader.manifest.scalars
        # an import from another trainer, whose groups may be others, has none
        values = scalars["optimizer_group_values"]
        nested = scalars.get("optimizer_group_nested") or [{} for _ in values]
        if not values:
            return
        groups = zip(self.optimizer.param_groups, self.built, self._stored_groups(scalars, values, nested), strict=True)
        for group, built, index in groups:
            changed, encoded = ({}, {}) if index is None else (values[index], nested[index])
            gone = {key for key, held in encoded.items() if "gone" in held}
            reads = self._reads(f"optimizer-group/{index}")
            changed = changed | {key: decode(held, reads) for key, held in encoded.items() if key not in gone}
            wanted = {key: value for key, value in built.items() if key not in gone and key != "lr"} | changed
            # those of later steps are there where a run goes back
            for key in group.keys() - wanted.keys() - {"params", "lr"}:
                del group[key]
            for key, value in wanted.items():
                if key not in group or not equal(group[key], value):
                    group[key] = value if key in changed else copy.deepcopy(value)

    def _stored_groups(
        self, scalars: dict[str, Any], values: list[dict[str, Any]], nested: list[dict[str, Any]]
    ) -> list[int | None]:
        """Return for each group the stored one whose values hold for it: another recipe may group otherwise.

        Raises UserError where its parameters were in groups with different values.
        """
        stored, mine = [set(group["params"]) for group in scalars.get("optimizer_groups", ())], self.groups
        if len(stored) != len(values) or stored == [set(names) for names in mine]:
            return [*range(len(values))]
        found: list[int | None] = []
        for names in mine:
            places = [place for place, held in enumerate(stored) if not held.isdisjoint(names)]
            for key in {key for place in places for key in (*values[place], *nested[place])}:
                if len(
                    different := [p for p in places if not equal(values[p].get(key), values[places[0]].get(key))]
                ) or (any(key in nested[place] for place in places) and len(places) > 1):
                    raise UserError(
                        f"the optimizer has changed '{key}' of its groups, differently for parameters that are one "
                        f"group now ({names[0]} and others, from the stored groups {[places[0], *different]}); keep "
                        "optim.groups, optim.no_decay and optim.layer_decay as they were"
                    )
            found.append(places[0] if places else None)
        return found

    def _taken(self, stored: Mapping[str, set[str]]) -> tuple[dict[str, frozenset[str]], list[str]]:
        """Return for each parameter the names in its `stored` state that are kept, and notes for the user."""
        scalars = self.reader.manifest.scalars
        found: dict[str, frozenset[str]] = {}
        notes: list[str] = []
        left_by: dict[str, str] = {}
        """The class that left a parameter's state, where there were several optimizers."""
        for group in scalars["optimizer_groups"] if scalars.get("optimizers") else ():
            left_by |= dict.fromkeys(group["params"], scalars["optimizers"][group[OPTIMIZER]])
        own = {
            name: {id(p) for group in part.param_groups for p in group["params"]}
            for name, part in parts_of(self.optimizer).items()
        }
        for name, part in parts_of(self.optimizer).items():
            mine = [each for each, shard in self.trained.items() if id(shard.entry) in own[name]] if name else [*stored]
            kept = {key for each in mine for key in stored.get(each, ())}
            classes = {left_by[each] for each in mine if each in left_by}
            was = " and ".join(sorted(classes)) if classes else scalars["optimizer"]
            keys, said = self._carried(part, name, was, kept)
            found |= dict.fromkeys(mine, keys)
            notes += said
        return found, notes

    def _carried(
        self, part: torch.optim.Optimizer, name: str, was: str, stored: set[str]
    ) -> tuple[frozenset[str], list[str]]:
        """Return what an optimizer keeps of the state that the class `was` has stored, and notes for the user."""
        if self.migrate is not None:
            try:
                carried = self.migrate(was, stored, name) if name else self.migrate(was, stored)
            except UserError as error:
                raise UserError(f"{self.reader.path}: {error}") from error
            return carried.keys, list(carried.notes)
        if was != (now := type(part).__name__):
            raise UserError(
                f"{self.reader.path} holds the state of {was}, the recipe asks for {now}; "
                "use the same optimizer, or start a new run with model.weights set to the exported model"
            )
        return frozenset(stored), []
