"""The command `distrain prove`: arguments in, exit status out."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from distrain.config import UserError
from distrain.launchers import gpu_count
from distrain.prove.proof import prove
from distrain.prove.report import Report, show
from distrain.system.output import echo_error
from distrain.system.terminal import Console

PROVED, DIVERGED, NOT_RUN = 0, 1, 2
"""The exit statuses."""


def run(
    recipe: str,
    overrides: Sequence[str],
    *,
    as_json: bool,
    kills: int,
    steps: int,
    processes: int | None,
    worlds: str,
    strategies: str,
    replicate: str,
    seed: int | None,
    keep: Path | None,
    loss_tolerance: float | None,
    state_tolerance: float | None,
    **options: Any,
) -> int:
    """Prove a recipe and print the result; returns the exit status. `options`: further arguments of `prove`."""
    # with --json, standard output holds only that
    console = Console(file=sys.stderr if as_json else sys.stdout)
    previous_handler = signal.signal(signal.SIGTERM, _stop)
    try:
        if processes is not None and worlds:
            raise UserError("--processes and --worlds both set the number of processes; remove one")
        with Report(console) as report:
            proof = prove(
                recipe,
                overrides,
                kills=kills,
                steps=steps,
                processes=processes or max(gpu_count(), 1),
                worlds=_parse_list("--worlds", worlds, _world),
                strategies=_parse_list("--strategies", strategies, str),
                replicate=_parse_list("--replicate", replicate, _world),
                seed=seed,
                keep=keep,
                loss_tolerance=loss_tolerance,
                state_tolerance=state_tolerance,
                begun=report.begun,
                done=report.done,
                **options,
            )
    except UserError as error:
        if as_json:
            print(json.dumps({"proved": None, "error": str(error)}, indent=2))
        echo_error(error)
        return NOT_RUN
    except KeyboardInterrupt:
        echo_error("interrupted; nothing is proved")
        return NOT_RUN
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    if as_json:
        print(json.dumps(proof.as_json(), indent=2))
    show(proof, console)
    return PROVED if proof.proved else DIVERGED


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parse_list(option: str, text: str, read: Callable[[str], Any]) -> list[Any]:
    """Return the values of a comma-separated list; raises UserError for a value that `read` rejects."""
    values = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        try:
            values.append(read(part))
        except ValueError:
            raise UserError(f"{option}: found {part!r}, expected a whole number from 1, as in 1,2,3") from None
    return values


def _world(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count
