"""One registry for all that a recipe or a command finds by name. Imports no torch, and nothing that is registered.

A name is looked up in this order: what is built in, what libraries offer beside it (torchvision, torchmetrics),
`path/to/file.py:NAME` and `package.module:NAME`, and last the entry points of installed packages, as in a pyproject:

    [project.entry-points."distrain.models"]
    my-net = "my_package.nets:MyNet"

Entry points are read once in a process, and only for a name that is not known otherwise; the package is imported only
when its name is used. What is named by a file, a module or an entry point is called as a person's own code is; where it
is decorated with `register`, it is called as what is built in.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from distrain.config import listing
from distrain.config.user_files import is_object_spec, resolve_object
from distrain.system.errors import UserError, close_names
from distrain.system.output import error_line

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """Something that has been found by its name."""

    name: str
    """As it is written in a recipe."""
    value: T
    """A class or function, or a description of one."""
    tasks: tuple[str, ...] = ()
    """The tasks that it can be used for; empty: all."""
    about: str = ""
    """What `summary` is, where that is not the first line of its docstring."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else was given to `register`."""
    registered: bool = True
    """Whether it was registered, and so is called as what is built in; otherwise as a person's own code."""
    spec: str | None = None
    """`package.module:NAME` or `path/to/file.py:NAME` where it is neither built in nor a library's."""

    @property
    def summary(self) -> str:
        """One line about it."""
        return self.about or (inspect.getdoc(self.value) or "").partition("\n")[0]


@dataclass(frozen=True)
class _Library(Generic[T]):
    """A library that offers names beside what is registered; see `Registry.add_library`."""

    names: Callable[[], Iterable[str]]
    find: Callable[[str], Entry[T] | None]
    prefix: str


class Registry(Generic[T]):
    """What can be named of one kind: a decorator that adds to it, and a look-up that finds or says what there is."""

    def __init__(
        self,
        kind: str,
        where: str,
        group: str | None,
        *home: str,
        others: str = "",
        fold: Callable[[str], str] = lambda name: name,
        prefixes: tuple[str, ...] = (),
        libraries: Callable[[], Mapping[str, Iterable[str]]] = dict,
    ):
        """`kind` and `where`, a recipe's key or an option, are for messages ("data set", "data.name").

        `group`: of entry points. `home`: the modules that register what is built in, imported at the first look-up;
        `package.*` is every module of a package. `others`: what there is besides, in words. `fold` makes spellings of
        one name equal. `prefixes`: those of libraries, see `add_library`, whose names `libraries` returns by library
        without importing one.
        """
        self.kind = kind
        self.where = where
        self.group = group
        self.others = others
        self._home: tuple[str, ...] | None = home
        self.fold = fold
        self._prefixes = prefixes
        self._listed_libraries = libraries
        self._entries: dict[str, Entry[T]] = {}
        self._libraries: list[_Library[T]] = []

    # ----------------------------------------------------------------------------------------------------------------
    # Adding

    def register(self, name: str, *, tasks: Sequence[str] = (), about: str = "", **metadata: Any) -> Callable[[V], V]:
        """Make what is decorated known by this name. Raises UserError where something else has it."""

        module = str(sys._getframe(1).f_globals.get("__name__"))
        is_own = not module.startswith("distrain.")

        def add(value: V) -> V:
            if is_own:
                self.load()  # so that a name which is built in is refused here, and not where the other is registered
            there = self._entries.get(self.fold(name))
            if there is not None and _place(there.value) != _place(value):
                raise UserError(
                    f"{self.kind} {name!r} of {_place(value)} has the name of {_place(there.value)}; give it another"
                )
            if is_own and self._library_find(name) is not None:
                raise UserError(f"{self.kind} {name!r} of {_place(value)} has the name of a library's; give it another")
            spec = _place(value) if is_own else None
            entry = Entry(name, value, tuple(tasks), about, metadata, spec=spec)
            self._entries[self.fold(name)] = entry  # type: ignore[assignment]
            return value

        return add

    def add_library(
        self,
        names: Callable[[], Iterable[str]],
        find: Callable[[str], Entry[T] | None],
        prefix: str = "",
    ) -> None:
        """Look in a library for what is not registered.

        With a `prefix`, one of the registry's, it is asked for the names that begin so, and for no others.
        """
        self._libraries.append(_Library(names, find, prefix))

    def _library_find(self, name: str) -> Entry[T] | None:
        """Return what a library has under this name, or None."""
        prefixed = self._is_prefixed(name)
        fitting = (each for each in self._libraries if name.startswith(each.prefix) and bool(each.prefix) == prefixed)
        return next((found for each in fitting if (found := each.find(name)) is not None), None)

    def _is_prefixed(self, name: str) -> bool:
        """Whether a name is a library's, though it looks like `package.module:name`."""
        return name.startswith(self._prefixes) if self._prefixes else False

    def load(self) -> None:
        """Import what is built in; otherwise that is done when a name is looked up."""
        home, self._home = self._home, None
        if home is None:
            return
        for module in home:
            package = importlib.import_module(module.removesuffix(".*"))
            if module.endswith(".*"):
                for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                    importlib.import_module(each.name)

    # ----------------------------------------------------------------------------------------------------------------
    # Finding

    def entries(self) -> list[Entry[T]]:
        """Return what is registered, sorted by name, without what is refused."""
        self.load()
        found = [entry for entry in self._entries.values() if "refused" not in entry.metadata]
        return sorted(found, key=lambda entry: entry.name)

    def names(self) -> list[str]:
        """Return the names of what is registered, sorted."""
        return [entry.name for entry in self.entries()]

    def summaries(self) -> dict[str, str]:
        """Return a line for each name: what is registered, a library's, then what packages offer, which stay closed.

        It is read from the sources where what is built in has not been imported, and nothing is imported then.
        """
        found = {entry.name: entry.summary for entry in self._entries.values() if "refused" not in entry.metadata}
        if self._home is not None:
            try:
                found |= listing.registered((self.group or f"{self.kind}s").removeprefix("distrain."), self._home)
            except OSError:  # an installation without sources
                self.load()
                return self.summaries()
        found = dict(sorted(found.items()))
        for library, names in self._listed_libraries().items():
            found |= dict.fromkeys(names, library)
        for name, offer in self.installed().items():
            found[name] = f"{offer.package} ({offer.spec})"
        return found

    def find(self, name: str, task: str | None = None) -> Entry[T]:
        """Return what has this name. Raises UserError where nothing has, or what has it is not for this task."""
        is_spec = is_object_spec(name) and not self._is_prefixed(name)
        entry = self._of_spec(name, name) if is_spec else self.built_in(name)
        if entry is None and (offer := self.installed().get(name)) is not None:
            entry = self._of_offer(offer)
        if entry is None:
            raise self.unknown(name)
        if (why := entry.metadata.get("refused")) is not None:
            raise UserError(f"{self.where}: {entry.name} {why}")
        if task not in (None, "custom") and entry.tasks and task not in entry.tasks:
            fitting = [each.name for each in self.entries() if not each.tasks or task in each.tasks]
            raise UserError(
                f"{self.where}: {self.kind} {name!r} is for {' or '.join(entry.tasks)}, and the recipe's task is "
                f"{task}; for that there are {', '.join(fitting)}, or your own"
            )
        return entry

    def built_in(self, name: str) -> Entry[T] | None:
        """Return what is registered or a library's under this name, or None."""
        self.load()
        return self._entries.get(self.fold(name)) or self._library_find(name)

    def spec_of(self, name: str) -> str | None:
        """Return `package.module:NAME` or `path/to/file.py:NAME` of what is named, or None where it is built in."""
        if is_object_spec(name):
            return name if not self._is_prefixed(name) else None
        self.load()
        entry = self._entries.get(self.fold(name))
        if entry is not None:
            return entry.spec
        # a library, which may take a second to import, is asked only where a package offers that name too
        offers = installed_offers()[0].get(self.group or "", ())
        offer = self.installed().get(name) if name in {each.name for each in offers} else None
        return offer.spec if offer is not None else None

    def unknown(self, name: str) -> UserError:
        """Return the error for a name that nothing has: with the close ones, or all."""
        self.load()
        names = self.names()
        choices = [*names, *(each for library in self._libraries for each in library.names()), *self.installed()]
        listed = ", ".join([*names, *self.installed()]) + (f", {self.others}" if self.others else "")
        own = "your own is 'path/to/file.py:NAME' or 'package.module:NAME'"
        own += f", or what a package offers as {self.group}" if self.group is not None else ""
        hint = close_names(name, choices, own) if close_names(name, choices) or not listed else ""
        hint = hint or f"; there are {listed}; {own}"
        return UserError("\n  ".join([f"{self.where}: no {self.kind} {name!r}{hint}", *self.refused_offers()]))

    def _of_spec(self, spec: str, name: str) -> Entry[T]:
        value = resolve_object(spec)
        for entry in self._entries.values():
            if entry.value is value and entry.spec is not None:
                return entry
        return Entry(name, value, registered=False, spec=spec)

    # ----------------------------------------------------------------------------------------------------------------
    # Installed packages

    def installed(self) -> dict[str, Offer]:
        """Return what installed packages offer under names of their own."""
        return self._offers()[0]

    def refused_offers(self) -> list[str]:
        """Return a line for each package whose entry points cannot be read, and each name that something else has."""
        return [*installed_offers()[1], *self._offers()[1]]

    def _offers(self) -> tuple[dict[str, Offer], list[str]]:
        named: dict[str, list[Offer]] = {}
        for offer in installed_offers()[0].get(self.group or "", ()):
            named.setdefault(offer.name, []).append(offer)
        found, refused = {}, []
        for name, offers in named.items():
            entry = self.built_in(name)
            specs = " or ".join(offer.spec for offer in offers)
            packages = " and ".join(offer.package for offer in offers)
            if entry is not None and entry.spec is None:
                refused.append(f"{name!r} of {packages} is the name of what is built in; name it as {specs}")
            elif len(offers) > 1:
                refused.append(f"{name!r} is offered by {packages}; name it as {specs}")
            else:
                found[name] = offers[0]
        return found, refused

    def _of_offer(self, offer: Offer) -> Entry[T]:
        try:
            return self._of_spec(offer.spec, offer.name)
        except UserError as error:
            raise UserError(f"{self.where}: {offer.name!r} of {offer.package} cannot be used: {error}") from error


@dataclass(frozen=True)
class Offer:
    """An entry point of an installed package."""

    name: str
    spec: str
    """`package.module:NAME`."""
    package: str
    """In words, with its version."""


@functools.cache
def installed_offers() -> tuple[dict[str, list[Offer]], list[str]]:
    """Return what packages offer by group of entry points, and a line for each whose entry points are damaged."""
    found: dict[str, list[Offer]] = {}
    problems: list[str] = []
    seen = set()
    for distribution in importlib.metadata.distributions():
        package = "an installed package"
        try:
            text = distribution.read_text("entry_points.txt")
            if text is None or "distrain." not in text:
                continue
            package = f"the installed package {distribution.name} {distribution.version}"
            if distribution.name in seen:
                continue  # further behind on sys.path, where Python does not find it either
            seen.add(distribution.name)
            for point in distribution.entry_points:
                if point.group.startswith("distrain."):
                    spec = f"{point.module}:{point.attr}"
                    if not is_object_spec(spec):
                        problems.append(
                            f"{package}: its {point.group} {point.name} is {point.value!r}, not module:NAME"
                        )
                    else:
                        found.setdefault(point.group, []).append(Offer(point.name, spec, package))
        except Exception as error:  # whatever a damaged package raises, the others hold
            problems.append(f"{package}: its entry points cannot be read: {error_line(error)}")
    return found, problems


def _place(value: Any) -> str:
    value = value.func if isinstance(value, functools.partial) else value
    return f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', value)}"


def squeezed(name: str) -> str:
    """Return a name without what spellings differ in: 'BCEWithLogits' and 'bce_with_logits' become equal."""
    return name.lower().replace("_", "").replace("-", "")


# --------------------------------------------------------------------------------------------------------------------
# The kinds. What registers them is named, and imported when one is looked up.


def _libraries() -> dict[str, list[str]]:
    """Return the names of models of libraries, by library."""
    of_torchvision = listing.library_models("torchvision", "models", "models/video", "models/segmentation")
    of_timm = [f"timm:{name}" for name in listing.library_models("timm", "models")]
    return {"torchvision.models": of_torchvision, "timm": of_timm}


models: Registry[Callable[..., Any]] = Registry(
    "model", "model.name", "distrain.models", "distrain.networks.*",
    others="any model of torchvision.models, timm:NAME, transformers:CLASS", prefixes=("timm:",), libraries=_libraries,
)  # fmt: skip
datasets: Registry[Callable[..., Any]] = Registry("data set", "data.name", "distrain.datasets", "distrain.datasets.*")
tasks: Registry[Callable[..., Any]] = Registry(
    "task", "task", "distrain.tasks", "distrain.training.tasks.built_in", "distrain.training.tasks.dpo"
)
losses: Registry[Callable[..., Any]] = Registry(
    "loss", "loss.name", "distrain.losses", "distrain.optim.losses.building",
    fold=lambda name: squeezed(name).removesuffix("loss"),
)  # fmt: skip
metrics: Registry[Callable[..., Any]] = Registry(
    "metric", "eval.metrics", "distrain.metrics", "distrain.metrics.catalogue", "distrain.metrics.entities",
    others="the classes of torchmetrics",
)  # fmt: skip
optimizers: Registry[Callable[..., Any]] = Registry(
    "optimizer", "optim.name", "distrain.optimizers", "distrain.optim.optimizers", "distrain.optim.muon", fold=squeezed
)
callbacks: Registry[Callable[..., Any]] = Registry("callback", "callbacks", "distrain.callbacks")
schedules: Registry[Callable[..., Any]] = Registry(
    "schedule", "schedule.name", "distrain.schedules", "distrain.config.schedules"
)
trackers: Registry[Callable[..., Any]] = Registry(
    "tracker",
    "log.trackers",
    "distrain.trackers",
    "distrain.training.callbacks.boards",
    "distrain.training.callbacks.services",
)
launchers: Registry[Callable[[], Any]] = Registry(
    "launcher", "launcher", "distrain.launchers", "distrain.launchers.*", "distrain.launchers.slurm.launcher"
)
reports: Registry[Callable[[Path], Path]] = Registry("report", "log.report", None, "distrain.report.ending")
formats: Registry[Callable[..., Any]] = Registry(
    # exporting first: the formats' modules and its own import each other's room
    "format",
    "--format",
    "distrain.formats",
    "distrain.checkpoints.export",
    "distrain.checkpoints.foreign.*",
)
