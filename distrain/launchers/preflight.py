"""What was asked for, in all the places where that can be, and whether it agrees."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from distrain.config import Recipe, UserError
from distrain.launchers.local import check_gpus
from distrain.run.folder import RunDir
from distrain.system.environment import has_launcher, join, launcher_argv, say_ignored

if TYPE_CHECKING:
    from distrain.parallel import Configuration, StrategySpec


def join_launcher(expected: int | None) -> tuple[int, Configuration]:
    """Return the size of the world and what its launcher was told, of which the environment is then rid.

    Raises UserError unless the world is the one that was asked for, by `expected` or by the launcher's own words. One
    that has `of_each_process` set is to be told by each process: nobody else started this one.
    """
    from distrain.parallel import check_world, read_configuration, take_over

    try:
        environment, ignored = join(os.environ)
    except UserError as error:
        error.of_each_process = not has_launcher()  # type: ignore[attr-defined]
        raise
    say_ignored(ignored)
    argv = launcher_argv()
    configuration = read_configuration(argv, os.environ)
    count = configuration.get("num_processes")
    configured = (int(count.value), count.place) if count is not None and str(count.value).isdigit() else None
    check_world(environment, expected, argv, configured)
    if (cpu := configuration.get("use_cpu")) is not None and str(cpu.value).lower() == "true":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # accelerate tells this to processes that it starts alone, not to several
        )
    import torch

    check_gpus(environment.local_world_size, torch.cuda.device_count())
    take_over(os.environ)
    return environment.world_size, configuration


def asked_for(
    run: RunDir,
    world_size: int,
    strategy: str,
    offload: str | None,
    configuration: Configuration,
    *,
    resumes: bool = False,
) -> StrategySpec:
    """Return the strategy that the options, the launcher's configuration and the run's launch.json agree on.

    `resumes`: the run itself was named, so that its launch.json says what this start is to be. Otherwise it is only
    what the run was started with before, and holds where nothing else is said. Raises UserError where two differ.
    """
    from distrain.parallel import StrategyHint, resolve_strategy, strategy_wishes

    option = None if strategy == "auto" else strategy
    wishes = [StrategyHint("--strategy", option), StrategyHint("--offload", None, offload)]
    earlier = None
    if option is None and run.launch_path.exists():
        record = run.launch()
        earlier = StrategyHint(
            str(run.launch_path),
            "ddp" if record.strategy == "single" else record.strategy,
            record.offload if offload is None else None,
        )
    wishes += [earlier] if resumes and earlier is not None else []
    return resolve_strategy(world_size, [*wishes, *strategy_wishes(configuration)], earlier)


def check_one_owner(
    configuration: Configuration, recipe: Recipe, world_size: int, origins: Mapping[str, str] | None = None
) -> None:
    """Raise UserError with each of the launcher's settings that differs from the recipe, which owns them.

    `origins`: where each of the recipe's values came from, by its dotted key.
    """
    from distrain.parallel import disagreements

    auto = "fp32"
    if "mixed_precision" in configuration and recipe.train.precision == "auto":
        import torch

        auto = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else auto
    if lines := disagreements(configuration, recipe, world_size, auto=auto, origins=origins):
        raise UserError(
            "the launcher's configuration and the recipe disagree; nothing was written.\n  - "
            + "\n  - ".join(lines)
            + "\nThe recipe owns batch, accumulation, clipping and arithmetic: take these out of the launcher's "
            "configuration, or change the recipe."
        )
