"""Whether all ranks have the same data: each takes its own share of every step, and of every evaluation.

What the ids of samples cannot tell is found here: a data set that each process shuffles anew, one that a process is
given a part of, and a folder that is another one on another node.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import xxhash

from distrain.config import UserError
from distrain.datasets.base import Data, StreamSource, is_stream
from distrain.fingerprints import beginning, items_of, same_item
from distrain.parallel import World

logger = logging.getLogger(__name__)

_NAMES = 100_000
"""Files whose names are compared."""

_ADVICE = (
    "Give every process all of the data in one order, of which distrain has each take its own share: take out what "
    "splits them by process (DistributedSampler, split_by_node, RANK), sort the names that a folder or a set lists, "
    "and seed a generator of your own"
)


def check_same_data(world: World, data: Data) -> None:
    """Raise UserError where a rank has other data than rank 0. All ranks call.

    A stream that gives other samples each time it is read is only a warning: it may be one without an end. That holds
    for a single rank too.
    """
    if world.world_size > 1:
        ranks = world.gather(world.run_on_all(lambda: _facts(data)))
        for rank, facts in enumerate(ranks):
            if line := _difference(ranks[0], facts):
                raise UserError(f"rank {rank} of {world.world_size} has other data than rank 0: {line}. {_ADVICE}")
    streams = {name: source for name, source in data.splits.items() if is_stream(source)}
    if streams:
        _check_streams(world, streams)


def _facts(data: Data) -> dict[str, Any]:
    """Return what tells the data of a rank from others, as far as that is cheap."""
    names = xxhash.xxh3_64()
    for path in itertools.islice(data.files, _NAMES):
        names.update(path.name.encode(errors="surrogateescape") + b"\0")
    listed = {} if data.files else items_of(data)
    return {
        "lengths": {name: None if is_stream(source) else len(source) for name, source in data.splits.items()},
        "classes": data.meta.class_names,
        "files": (len(data.files), names.hexdigest()),
        "items": {name: items for name, items in listed.items() if not is_stream(data.splits[name])},
    }


def _difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return how the data of a rank differ from those of rank 0; empty where they do not."""
    for name in dict.fromkeys([*first["lengths"], *other["lengths"]]):
        there, here = (each["lengths"].get(name, 0) for each in (first, other))
        if there != here:
            return f"{here} samples of split {name!r} in place of {there}"
    if first["classes"] != other["classes"]:
        return f"the classes {other['classes']} in place of {first['classes']}"
    if first["files"] != other["files"]:
        return f"{other['files'][0]:,} files in place of {first['files'][0]:,}, or other names of them"
    for split, items in first["items"].items():
        for number, item in items.items():
            if not same_item(item, other["items"].get(split, {}).get(number, item)):
                return f"sample {number} of split {split!r} is another one"
    return ""


def _check_streams(world: World, streams: Mapping[str, StreamSource]) -> None:
    # in one process too: a resume would read it once more than the run did
    found = world.run_on_all(lambda: {name: beginning(source) for name, source in streams.items()})
    ranks = world.gather(found)
    odd = [name for name in found if not all(same_item(each[name][0], ranks[0][name][0]) for each in ranks)]
    changing = {name for each in ranks for name, (_, stays) in each.items() if not stays}
    if alike := [name for name in odd if name not in changing]:
        raise UserError(f"ranks read different samples of the stream of split {' and '.join(alike)}. {_ADVICE}")
    if changing and world.rank == 0:
        logger.warning(
            f"the stream of split {' and '.join(sorted(changing))} gives other samples each time that it is read: it "
            "depends on how often that was, so a resume or another number of processes may train on others, and where "
            "ranks disagree and it has an end, some are taken several times and others never. Begin each pass anew, "
            "and shuffle by the global generators of random, numpy and torch, which distrain seeds, or by one that "
            "set_epoch(epoch) seeds"
        )
