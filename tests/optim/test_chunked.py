"""Cross entropy in chunks of rows: beside torch's own on whole logits, and what it allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocated import Allocated
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.nn import functional

from distrain.optim.losses.chunked import LARGEST_CHUNK, SMALLEST_CHUNK, chunk_count, chunked_cross_entropy

ROWS, WIDTH, CLASSES = (3, 7), 6, 11


def tensors(dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(CLASSES, ROWS, generator=generator)
    targets[0, 2:5] = -100
    return draw(*ROWS, WIDTH), draw(CLASSES, WIDTH), draw(CLASSES) if bias else None, targets


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **how: Any) -> Tensor:
    logits = functional.linear(hidden, weight, bias).flatten(0, 1)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    weights = how.get("class_weights")
    return functional.cross_entropy(
        exact,
        targets.flatten(),
        weights if weights is None else weights.to(exact),
        ignore_index=how["ignore_index"],
        reduction="sum",
        label_smoothing=how.get("label_smoothing", 0.0),
    )


WEIGHTS = torch.linspace(0.0, 2.0, CLASSES, dtype=torch.float64)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "another ignored target": {"ignore_index": 3},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"class_weights": WEIGHTS},
    "weighted and smoothed": {"class_weights": WEIGHTS, "label_smoothing": 0.3},
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("largest", [LARGEST_CHUNK, 5 * CLASSES, 1], ids=["one chunk", "five rows", "one row"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_torchs_own_and_so_are_its_gradients(dtype, case, largest, bias):
    *parameters, targets = tensors(dtype, bias)
    how = {"ignore_index": -100} | CASES[case]
    if how["ignore_index"] != -100:
        targets = targets.where(targets != -100, 0)
    trained = [each for each in parameters if each is not None]
    found = chunked_cross_entropy(*parameters, targets, largest=largest, **how)
    expected = whole(*parameters, targets, **how)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found * 0.37, trained), torch.autograd.grad(expected * 0.37, trained), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=case)


@pytest.mark.parametrize("classes", [CLASSES, 16], ids=["padded rows", "aligned rows"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_under_autocast_it_is_no_less_exact_than_torchs_own(bias, classes):
    generator = torch.Generator().manual_seed(1)
    exact = [torch.randn(64, 32, generator=generator), torch.randn(classes, 32, generator=generator)]
    exact += [torch.randn(classes, generator=generator)] if bias else []
    targets = torch.randint(classes, (64,), generator=generator)

    def gradients(dtype: torch.dtype, compute: Any) -> list[Tensor]:
        parameters = [each.to(dtype).requires_grad_() for each in exact]
        given = (*parameters, *([] if bias else [None]), targets)
        if dtype == torch.float64:
            total = functional.cross_entropy(functional.linear(*given[:3]), targets, reduction="sum")
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                total = compute(*given)
            assert total.dtype == torch.float32
        return [total.detach(), *torch.autograd.grad(total / 64, parameters)]

    right = gradients(torch.float64, None)
    ours = gradients(
        torch.float32, lambda *given: chunked_cross_entropy(*given, ignore_index=-100, largest=9 * classes)
    )
    theirs = gradients(
        torch.float32,
        lambda h, w, b, t: functional.cross_entropy(functional.linear(h, w, b).float(), t, reduction="sum"),
    )
    for exactly, one, other in zip(right, ours, theirs, strict=True):
        error, usual = (one.double() - exactly).norm(), (other.double() - exactly).norm()
        assert error <= 1.5 * usual + 1e-6 * exactly.norm()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen):
    *parameters, targets = tensors(torch.float64, True)
    parameters[frozen].requires_grad_(False)
    chunked_cross_entropy(*parameters, targets, ignore_index=-100, largest=1).backward()
    assert [each.grad is None for each in parameters] == [place == frozen for place in range(3)]


def test_rows_that_do_not_count_may_be_infinite():
    hidden, weight, _, targets = tensors(torch.float64, False)
    with torch.no_grad():
        hidden[0, 2:5] = torch.inf
    assert chunked_cross_entropy(hidden, weight, None, targets, ignore_index=-100).isfinite()


def test_a_target_that_is_no_class_is_an_error():
    hidden, weight, _, targets = tensors(torch.float64, False)
    for wrong in (CLASSES, -1):
        targets[1, 1] = wrong
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            chunked_cross_entropy(hidden, weight, None, targets, ignore_index=-100)


@pytest.mark.parametrize(
    ("rows", "classes", "chunks"),
    [(100, 100, 1), (512, 16384, 2), (4 * 1024, 50257, 4), (12 * 1024, 50257, 5), (16 * 4096, 128256, 63)],
)
def test_chunks_are_few_and_none_is_too_large(rows, classes, chunks):
    assert chunk_count(rows, classes) == chunks
    assert rows * classes <= chunks * LARGEST_CHUNK
    assert chunks > 1 or rows * classes <= SMALLEST_CHUNK


@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "fp32"])
def test_logits_are_never_whole(narrow):
    rows, classes = 512, 2**15
    hidden, weight = torch.randn(rows, 2, requires_grad=True), torch.randn(classes, 2, requires_grad=True)
    targets = torch.randint(classes, (rows,))
    largest = {}
    for name, compute in (("chunked", chunked_cross_entropy), ("whole", whole)):
        shaped = (hidden, weight) if name == "chunked" else (hidden[None], weight)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow), Allocated() as allocated:
            compute(*shaped, None, targets, ignore_index=-100).backward()
        largest[name] = max(allocated.largest.values())
    assert largest["whole"] == rows * classes
    assert largest["chunked"] == rows * classes // 4


def test_compiled_it_is_the_same_without_a_scatter() -> None:
    *parameters, targets = tensors(torch.float32, True)
    graphs = EagerAndRecordGraphs()
    compiled = torch.compile(chunked_cross_entropy, backend=graphs, fullgraph=True)
    how: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.1, "largest": 5 * CLASSES}
    found, expected = compiled(*parameters, targets, **how), chunked_cross_entropy(*parameters, targets, **how)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    (graph,) = graphs.graphs
    operations = {str(node.target) for node in graph.graph.nodes}
    assert "gather" in operations
    assert not {each for each in operations if "scatter" in each}, "it would need the chunk's slope in fp32, in memory"


@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_that_vary_are_not_compiled_for_each_number_of_them(chunks: int) -> None:
    weight = torch.randn(CLASSES, WIDTH)
    graphs = EagerAndRecordGraphs()
    torch._dynamo.reset()
    compiled = torch.compile(chunked_cross_entropy, backend=graphs, fullgraph=True)
    for rows in range(20, 14, -1):
        hidden, targets = torch.randn(rows, WIDTH), torch.randint(CLASSES, (rows,))
        how: dict[str, Any] = {"ignore_index": -100, "largest": -(-20 // chunks) * CLASSES}
        if chunk_count(rows, CLASSES, how["largest"]) == chunks:
            torch.testing.assert_close(
                compiled(hidden, weight, None, targets, **how),
                chunked_cross_entropy(hidden, weight, None, targets, **how),
            )
    assert len(graphs.graphs) <= 3, "for one number, for any, and for any that the chunks divide"


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_little_is_held() -> None:
    rows, classes = 4096, 50257
    hidden = torch.randn(rows, 64, device="cuda", requires_grad=True)
    weight = torch.randn(classes, 64, device="cuda", requires_grad=True)
    targets = torch.randint(classes, (rows,), device="cuda")

    def gradients(compute: Any) -> tuple[int, list[Tensor]]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                total = compute(hidden, weight, None, targets)
            found = [total.detach(), *torch.autograd.grad(total / rows, (hidden, weight))]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return torch.cuda.max_memory_allocated() - before, found

    def chunked(*given: Any) -> Tensor:
        return chunked_cross_entropy(*given, ignore_index=-100)

    least, expected = gradients(lambda h, w, b, t: whole(h[None], w, b, t, ignore_index=-100))
    most, found = gradients(chunked)
    assert most < 0.5 * least
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
    compiled = torch.compile(chunked, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        compiled(hidden, weight, None, targets).backward()  # compiling waits for the device
    compiled_most, found = gradients(compiled)
    assert compiled_most <= most, "compiled, a chunk's logits are never in fp32"
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
