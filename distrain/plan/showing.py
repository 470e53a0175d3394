"""A plan as lines of text, none wider than 80 columns."""

from __future__ import annotations

import textwrap

from distrain.plan.planning import Option, Plan
from distrain.system.memory import GIB
from distrain.system.numbers import counted

WIDTH = 80
_COLUMNS = {
    "weights": ("weights", "gathered weights"),
    "grads": ("gradients", "buffers"),
    "optim.": ("optimizer", "average", "optimizer step"),
    "activ.": ("activations", "batch"),
    "other": ("fragments", "workspaces", "CUDA and NCCL"),
}


def plan_lines(plan: Plan) -> list[str]:
    """Return what `distrain plan` prints."""
    unit, size = ("GiB", GIB) if max(each.memory.total for each in plan.options) >= GIB else ("MiB", 2**20)
    lines = [*_head(plan), "", *_table(plan, unit, size), "", *_choice(plan), *_end(plan)]
    for note in plan.notes:
        lines += _wrapped("note: ", note)
    return lines


def _head(plan: Plan) -> list[str]:
    parameters = sum(each.numel for each in plan.model.parameters)
    trained = plan.model.trained_elements
    some = "" if trained == parameters else f" ({_count(trained)} trained)"
    gpu = plan.gpu
    where = f"{plan.per_node} x {gpu.name}" if gpu.device_type == "cuda" else f"{plan.per_node} on the CPU"
    nodes = f"{plan.nodes} nodes with {where} each" if plan.nodes > 1 else where
    micro = "auto" if plan.micro_is_auto else str(plan.options[0].micro)
    return [
        *_wrapped("", f"{plan.name}: {_count(parameters)} parameters{some}, {plan.precision}, "
                  f"{plan.model.optimizer.name}"),
        *_wrapped("", f"{nodes}, {gpu.memory_gib:,.1f} GiB; batch.global {plan.global_batch_size}, "
                  f"batch.micro {micro}"),
    ]  # fmt: skip


def _table(plan: Plan, unit: str, size: float) -> list[str]:
    head = f" {unit + ' each':<13}" + "".join(f"{name:>7}" for name in (*_COLUMNS, "total"))
    lines = [f"{head}  {'micro':>10} {'ms/step':>9}"]
    for each in plan.options:
        name = each.strategy if each.checkpointing == plan.asked_checkpointing else _other(each)
        cells = [sum(each.memory.parts.get(part, 0) for part in parts) for parts in _COLUMNS.values()]
        numbers = "".join(f"{_number(cell / size):>7}" for cell in (*cells, each.memory.total))
        most = "none fits" if each.largest is None else f"{each.micro}/{each.largest}"
        star = "*" if each == plan.chosen else " " if each.fits else "-"
        lines.append(f"{star}{name:<13}{numbers}  {most:>10} {_ms(each.time.total):>9}")
    legend = "* recommended, - does not fit; micro: planned / the largest that fits"
    if len({each.checkpointing for each in plan.options}) > 1:
        legend += "; recomputed: with train.activation_checkpointing"
    lines += _wrapped("", legend)
    return lines


def _other(option: Option) -> str:
    return "+ recomputed" if option.checkpointing else "- recomputed"


def _choice(plan: Plan) -> list[str]:
    if plan.chosen is None:
        return _wrapped("", plan.reason)
    arguments = " ".join(plan.arguments(plan.chosen)) or "nothing to add"
    return [*_wrapped("take:   ", arguments), *_wrapped("why:    ", plan.reason)]


def _end(plan: Plan) -> list[str]:
    if plan.chosen is None:
        return []
    seconds = plan.chosen.time.total
    speed = plan.global_batch_size / seconds
    rate = f"{speed:,.0f} samples/s" if speed >= 10 else f"{speed:.2f} samples/s"
    if plan.tokens_per_sample:
        rate = f"{speed * plan.tokens_per_sample:,.0f} tokens/s"
    time = f"{counted(plan.total_steps, 'step')} of {_ms(seconds)} ms, {_duration(seconds * plan.total_steps)}; {rate}"
    lines = _wrapped("time:   ", f"about {time}")
    if plan.chosen.time.communication:
        behind = plan.chosen.time.communication - plan.chosen.time.exposed
        sends = f"of a step {_ms(plan.chosen.time.communication)} ms are sent, {_ms(max(behind, 0))} ms of them hidden"
        lines += _wrapped("        ", sends)
    count = "some" if plan.checkpoints is None else f"{plan.checkpoints:,}"
    saved = f"{count} checkpoint{'s' * (plan.checkpoints != 1)} of {size_text(plan.checkpoint_bytes)}"
    saved += f" and up to {plan.checkpoints_of_best:,} of the best" if plan.checkpoints_of_best else ""
    kept = f", {plan.kept} kept: {size_text(plan.kept * plan.checkpoint_bytes)}"
    return [*lines, *_wrapped("disk:   ", saved + kept)]


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label)) or [label.rstrip()]


def _count(number: int) -> str:
    for size, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _ms(seconds: float) -> str:
    return _number(seconds * 1e3)


def size_text(nbytes: float) -> str:
    """Return bytes as text in the unit that fits."""
    for size, name in ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB")):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {name}" if nbytes < 1000 * size else f"{nbytes / size:,.0f} {name}"
    return f"{nbytes / 1024:.3g} KiB"


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s"
