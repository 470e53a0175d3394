"""What starts from a plan: the strategy of a new run, the search for a micro-batch, and a dry run of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import write_recipe
from test_planning import GPT
from typer.testing import CliRunner

from distrain.cli.main import app
from distrain.launchers.request import strategy_of
from distrain.parallel import StrategySpec
from distrain.plan.asking import largest_of, main

DDP = StrategySpec("ddp")


def option(strategy: str, total: int, seconds: float, *, fits: bool, checkpointing: bool = False) -> dict[str, Any]:
    return {
        "strategy": strategy, "activation_checkpointing": checkpointing, "fits": fits, "total_bytes": total,
        "largest_micro_batch_size": 4 if fits else None, "step": {"total_s": seconds},
    }  # fmt: skip


def plan(*options: dict[str, Any]) -> dict[str, Any]:
    return {"options": [*options], "gpu_memory_bytes": 80 * 2**30}


ROOMY = option("ddp", 10 * 2**30, 1.0, fits=True)
FULL = option("ddp", 120 * 2**30, 1.0, fits=False)


@pytest.mark.parametrize(
    ("found", "strategy", "why"),
    [
        (None, "ddp", "as none could be planned"),
        (plan(ROOMY, option("fsdp2", 2**30, 0.5, fits=True)), "ddp", "which fits by the plan"),
        (plan(FULL, option("zero1", 60 * 2**30, 2.0, fits=True), option("fsdp2", 2**30, 1.5, fits=True)),
         "fsdp2", "by the plan; ddp would take 120.00 GiB of 80.00 GiB of a GPU"),
        (plan(FULL, option("hsdp", 2**30, 1.5, fits=True)), "fsdp2", "one replica for each machine, by the plan"),
        (plan(FULL, option("ddp", 2**30, 1.5, fits=True, checkpointing=True)), "ddp", "as nothing fits by the plan"),
    ],
    ids=["none", "fits", "fastest that fits", "replicas", "not with another recipe"],
)  # fmt: skip
def test_auto_is_ddp_unless_a_plan_says_that_it_does_not_fit(
    found: dict[str, Any] | None, strategy: str, why: str
) -> None:
    spec, note = strategy_of(found, DDP)
    assert spec.strategy == strategy
    assert spec.replicate == ("auto" if "replica" in why else 1)
    assert note.startswith("strategy auto: ")
    assert why in note


def test_a_search_starts_at_what_the_plan_has_for_its_strategy() -> None:
    found = plan(FULL, option("fsdp2", 1, 1.0, fits=True, checkpointing=True))
    assert largest_of(found, "fsdp2", checkpointing=True) == 4
    assert largest_of(found, "fsdp2", checkpointing=False) is None
    assert largest_of(found, "ddp", checkpointing=False) is None


@pytest.mark.parametrize("gpu", ["h100", "h101"])
def test_a_plan_in_a_process_of_its_own_is_a_file(tmp_path: Path, gpu: str) -> None:
    write_recipe(tmp_path, GPT, "recipe.yaml")
    (tmp_path / "asked.json").write_text(json.dumps({"gpu": gpu, "nodes": 1, "per_node": 2}))
    main(str(tmp_path))
    found = json.loads((tmp_path / "plan.json").read_text())
    if gpu == "h100":
        assert [each["strategy"] for each in found["options"]][:2] == ["ddp", "ddp"]
    else:
        assert "did you mean 'h100'" in found["problem"]


@pytest.mark.parametrize("kind", ["a100", None, "rocket"])
def test_a_dry_run_of_a_job_on_gpus_has_a_plan_beside_its_script(tmp_path: Path, kind: str | None) -> None:
    site, recipe = tmp_path / "site.yaml", write_recipe(tmp_path, GPT)
    site.write_text(f"description: here\n{f'gpu_type: {kind}' if kind else ''}\n")
    arguments = ["submit", str(recipe), "--time", "10", "--run-dir", str(tmp_path / "run"), "--dry-run"]
    ended = CliRunner().invoke(app, [*arguments, "--gpus-per-node", "2", "--site", str(site)])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.startswith("#!/bin/bash\n")
    expected = {
        "a100": "take:   --strategy ddp",
        None: "no plan, as it is not told the kind of GPU (gpu_type of a site): distrain plan RECIPE --gpu NAME",
        "rocket": "no plan, as it does not know rocket",
    }
    assert expected[kind] in ended.stderr
    assert "take:" not in ended.stdout
