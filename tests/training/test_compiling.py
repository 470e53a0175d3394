"""`train.compile` and the loss inside the model: the same numbers, one graph, and nothing compiled twice."""

from __future__ import annotations

import _ctypes
import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from allocated import Allocated
from filelock import FileLock
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import clear_caches

from distrain.config import CompileSection, Recipe, TuneSection, UserError
from distrain.datasets.base import DataMeta
from distrain.diagnose.index_errors import explaining_errors, given
from distrain.networks.calling import ModelOutput, calling_convention
from distrain.networks.gpt import GPT
from distrain.optim import Loss, build_loss
from distrain.parallel.tuning import Logits
from distrain.training.callbacks.hidden_state import hidden_state
from distrain.training.compiling import (
    CACHE,
    NOTHING,
    Compiled,
    cache_folder,
    compile_model,
    discard_unfinished,
    graphs_and_failures,
    resolve_compile,
    warn_of_failures,
)
from distrain.training.inner_loss import compute_loss_inside, logits_of
from distrain.training.setup import EVAL_LOGITS, TrainSetup
from distrain.training.tasks import SupervisedObjective

CPU = torch.device("cpu")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing compiled in this process, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(CACHE, raising=False)
    start_anew()
    yield tmp_path
    torch._dynamo.config.suppress_errors = False  # type: ignore[attr-defined]
    torch._dynamo.reset()


def start_anew() -> None:
    torch._dynamo.reset()
    counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()


class WithAux(nn.Module):
    """A model with a loss of its own beside its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        return {"logits": logits, "aux_loss": logits.square().mean()}


def recipe(task: str, **sections: Any) -> Recipe:
    given = {"name": "t", "task": task, "data": {"name": "iris"}, "model": {"name": "mlp"}, "batch": {"global": 4}}
    return Recipe.model_validate(given | {"train": {"steps": 1}} | sections)


def loss_named(name: str, task: str, **args: Any) -> Loss:
    return build_loss(recipe(task, loss={"name": name, **args}), DataMeta())


CASES: dict[str, Any] = {
    "language model, chunked": (
        lambda: GPT(11, 8, n_layer=1, n_head=1, d_model=6),
        "head",
        partial(loss_named, "cross_entropy", "language_modeling", label_smoothing=0.1),
        lambda: (torch.randint(11, (2, 8)), torch.randint(11, (2, 8))),
    ),
    "language model": (
        lambda: GPT(11, 8, n_layer=1, n_head=1, d_model=6, tied=False),
        "",
        partial(loss_named, "cross_entropy", "language_modeling"),
        lambda: (torch.randint(11, (2, 8)), torch.randint(11, (2, 8))),
    ),
    "auxiliary loss": (
        WithAux,
        "",
        partial(loss_named, "cross_entropy", "classification", weight=[0.5, 1.0, 2.0]),
        lambda: (torch.randn(5, 4), torch.randint(3, (5,))),
    ),
    "elements": (
        lambda: nn.Linear(4, 3),
        "",
        partial(loss_named, "bce_with_logits", "multilabel"),
        lambda: (torch.randn(5, 4), torch.randint(2, (5, 3)).float()),
    ),
}


def gradients(model: nn.Module, loss: Loss, batch: dict[str, Any], *, inside: bool) -> list[Tensor]:
    model.zero_grad()
    objective = SupervisedObjective(loss)
    objective.call, objective.inside = calling_convention(model), inside
    total = objective.loss_sum(model, batch)
    (total / 3).backward()
    return [total.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_inside_is_the_loss_outside(case: str, narrow: bool, compiled: bool, fresh: Path) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    build, head, make_loss, draw = CASES[case]
    torch.manual_seed(0)
    outside, loss, batch = build(), make_loss(), dict(zip(("inputs", "targets"), draw(), strict=True))
    inside = copy.deepcopy(outside)
    compute_loss_inside(inside, loss, head)
    if narrow:  # as a strategy does it
        for model in (outside, inside):
            model.forward = torch.autocast("cpu", torch.bfloat16)(convert_outputs_to_fp32(model.forward))
    plain = calling_convention(outside)(outside, batch["inputs"]).logits
    torch.testing.assert_close(calling_convention(inside)(inside, batch["inputs"]).logits, plain, rtol=0, atol=0)
    loss.prepare(CPU, torch.float32)
    if compiled:
        compile_model(inside, Compiled(CompileSection(backend="aot_eager", fullgraph=True)))
    tolerance = {"rtol": 3e-2, "atol": 3e-3} if narrow else {}
    for step in range(2):
        expected = gradients(outside, loss, batch, inside=False)
        found = gradients(inside, loss, batch, inside=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)
        if compiled and step == 0:
            assert graphs_and_failures() == (1, [])
    if compiled:
        assert graphs_and_failures() == (1, []), "what the loss notes for itself compiles nothing anew"


@pytest.mark.parametrize("narrow", [True, False], ids=["bf16", "fp32"])
def test_no_tensor_of_a_step_is_as_large_as_the_logits(narrow: bool) -> None:
    tokens, classes = 512, 2**15
    loss = loss_named("cross_entropy", "language_modeling")
    batch = {"inputs": torch.randint(classes, (2, tokens // 2)), "targets": torch.randint(classes, (2, tokens // 2))}
    largest = {}
    for head in ("head", ""):
        model = GPT(classes, tokens // 2, n_layer=1, n_head=1, d_model=2)
        compute_loss_inside(model, loss, head)
        if narrow:
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        with Allocated() as allocated:
            gradients(model, loss, batch, inside=True)
        largest[head] = allocated.largest[torch.float32]
    assert largest[""] == tokens * classes
    assert largest["head"] == tokens * classes // 4


def test_an_evaluation_holds_no_more_logits_than_fit() -> None:
    for micro, each, expected in [(8, 0, 8), (8, EVAL_LOGITS // 4, 4), (8, 2 * EVAL_LOGITS, 1), (2, 5, 2)]:
        parts = SimpleNamespace(
            feed=SimpleNamespace(micro_batch_size=micro), training=SimpleNamespace(logits_per_sample=each)
        )
        assert TrainSetup.eval_batch_size.fget(parts) == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("micro", [1, 2])
def test_logits_are_known_as_far_as_the_lengths_are(micro: int) -> None:
    model, loss = GPT(2**15, 8, n_layer=1, n_head=1, d_model=2), loss_named("cross_entropy", "language_modeling")
    world: Any = SimpleNamespace(mixed_precision=SimpleNamespace(scaled=False), precision="fp32")
    text = recipe("language_modeling")

    def found(tokens: int | None, **tune: Any) -> Logits:
        asked = text.model_copy(update={"tune": TuneSection.model_validate(tune)})
        return logits_of(asked, world, loss, model, tokens)

    assert found(micro * 512) == Logits("", micro * 2**24, "") if micro == 1 else Logits("head", micro * 2**24, "")
    assert found(micro * 8, chunked_loss=True) == Logits("head", micro * 2**18, "")
    assert found(None) == Logits("head", None, "")
    assert found(2**20, chunked_loss=False).obstacle == "tune.chunked_loss is false"
    world.mixed_precision.scaled, world.precision = True, "fp16"
    assert found(2**20).obstacle == "under fp16 gradients are computed from a scaled loss"
    nll = logits_of(text, world, loss_named("nll", "language_modeling"), model, 2**20)
    assert nll.obstacle == "loss nll of task language_modeling is computed from whole logits"


def test_a_proof_finds_no_state_in_it() -> None:
    model, loss = GPT(5, 8, n_layer=1, n_head=1, d_model=4), loss_named("cross_entropy", "language_modeling")
    compute_loss_inside(model, loss, "head")
    before = hidden_state({"model": model})
    gradients(model, loss, {"inputs": torch.randint(5, (2, 8)), "targets": torch.randint(5, (2, 8))}, inside=True)
    assert hidden_state({"model": model}) == before


def test_the_loss_is_whole_for_targets_that_are_probabilities() -> None:
    torch.manual_seed(0)
    model, loss = GPT(5, 8, n_layer=1, n_head=1, d_model=4), loss_named("cross_entropy", "language_modeling")
    targets = torch.rand(2, 8, 5).softmax(-1)
    batch = {"inputs": torch.randint(5, (2, 8)), "targets": targets}
    expected = gradients(model, loss, batch, inside=False)
    compute_loss_inside(model, loss, "head")
    for ours, theirs in zip(gradients(model, loss, batch, inside=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_targets_out_of_range_are_an_error_in_compiled_code_too(fresh: Path) -> None:
    model, loss = nn.Linear(2, 1), loss_named("bce_with_logits", "binary")
    compute_loss_inside(model, loss)
    compile_model(model, Compiled(CompileSection(backend="eager")))
    batch = {"inputs": torch.randn(3, 2), "targets": torch.tensor([[0.0], [1.0], [2.0]])}
    with pytest.raises(UserError, match="takes targets from 0 to 1, and these are from 0 to 2"):
        gradients(model, loss, batch, inside=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("key", ["inputs", "targets"])
def test_tokens_out_of_range_are_named_with_their_sample(key: str, compiled: bool, fresh: Path) -> None:
    model, loss = GPT(5, 8, n_layer=1, n_head=1, d_model=4), loss_named("cross_entropy", "language_modeling")
    batch = {name: torch.randint(5, (2, 8)) for name in ("inputs", "targets")} | {"ids": torch.tensor([3, 7])}
    batch[key][1, 2] = 70
    compute_loss_inside(model, loss, "head")
    if compiled:
        compile_model(model, Compiled(CompileSection(backend="aot_eager")))
    given("step 5", [batch])
    with (
        pytest.raises(UserError, match=f"step 5: the {key} hold 70, in sample 7"),
        explaining_errors(lambda: (model, loss)),
    ):
        gradients(model, loss, batch, inside=True)


def test_targets_that_do_not_fit_are_an_error_in_both_ways() -> None:
    model, loss = GPT(5, 8, n_layer=1, n_head=1, d_model=4), loss_named("cross_entropy", "language_modeling")
    batch = {"inputs": torch.randint(5, (2, 8)), "targets": torch.randint(5, (2, 7))}
    words = r"outputs of shape \(2, 8, 5\) do not fit targets of shape \(2, 7\)"
    with pytest.raises(UserError, match=words):
        gradients(model, loss, batch, inside=False)
    compute_loss_inside(model, loss, "head")
    with pytest.raises(UserError, match=words):
        gradients(model, loss, batch, inside=True)


@pytest.mark.slow
def test_a_later_attempt_compiles_nothing_anew(fresh: Path) -> None:
    loss, batch = loss_named("mse", "regression"), {"inputs": torch.randn(3, 2), "targets": torch.randn(3, 1)}
    loss.prepare(CPU, torch.float32)
    compiles = []
    for _ in range(2):
        start_anew()
        model = nn.Linear(2, 1)
        compute_loss_inside(model, loss)
        compile_model(model, Compiled(CompileSection()))
        gradients(model, loss, batch, inside=True)
        compiles.append((counters["inductor"]["fxgraph_cache_miss"], counters["aot_autograd"]["autograd_cache_miss"]))
        assert graphs_and_failures() == (1, [])
    assert cache_folder().is_relative_to(fresh)
    assert any(cache_folder().iterdir())
    assert sum(compiles[0]) > 0
    assert compiles[1] == (0, 0)
    assert counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"] > 0


@pytest.mark.slow
def test_what_a_kill_has_left_half_linked_is_compiled_anew(fresh: Path) -> None:
    loss, batch = loss_named("mse", "regression"), {"inputs": torch.randn(3, 5), "targets": torch.randn(3, 1)}
    loss.prepare(CPU, torch.float32)
    for _ in range(2):
        start_anew()
        clear_caches()
        model = nn.Linear(5, 1)
        compute_loss_inside(model, loss)
        compile_model(model, Compiled(CompileSection()))
        gradients(model, loss, batch, inside=True)
        libraries = list(cache_folder().glob("*/*.so"))
        assert libraries
        for library in libraries:
            content = library.read_bytes()
            assert len(content) > 4096
            library.unlink()  # it is mapped
            library.write_bytes(content[:1000])


def test_what_is_linked_now_stays(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "ab").mkdir()
    whole, cut, empty, locked = (tmp_path / "ab" / f"{name}.main.so" for name in ("whole", "cut", "empty", "locked"))
    library = Path(_ctypes.__file__).read_bytes()
    for path, content in {whole: library, cut: library[:-1], empty: b"", locked: b""}.items():
        path.write_bytes(content)
    interrupted = tmp_path / "ab" / "interrupted.main.so"
    interrupted.write_bytes(library)
    interrupted.with_name("interrupted.main_CxxBuild").mkdir()
    with FileLock(tmp_path / "locks" / "locked.lock"):
        discard_unfinished(tmp_path)
    assert sorted(path.name for path in (tmp_path / "ab").iterdir()) == ["locked.main.so", "whole.main.so"]
    discard_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "ab").iterdir()] == ["whole.main.so"]
    discard_unfinished(tmp_path / "nothing")


def test_a_cache_that_somebody_has_chosen_stays(tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "chosen"))
    compiled = Compiled(CompileSection(backend="eager"))
    compile_model(nn.Linear(2, 1), compiled)
    assert compiled.record()["cache"] == str(tmp_path / "chosen")


# --------------------------------------------------------------------------------------------------------------------
# What the key comes to


def test_what_each_setting_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    section = CompileSection(mode="max-autotune")
    for device in (CPU, torch.device("cuda")):
        assert resolve_compile(False, device) is NOTHING
        assert resolve_compile(True, device).how == CompileSection()
        assert resolve_compile(section, device).how is section
        assert not resolve_compile(True, device).lenient
    assert resolve_compile("auto", CPU) == Compiled(None, "auto: a CPU gains little by it")
    for capability, found, why in [
        ((9, 0), True, "auto: on this GPU"),
        ((6, 1), True, "auto: Triton needs compute capability 7.0, and this GPU has 6.1"),
        ((9, 0), False, "auto: the package triton is not installed"),
    ]:
        gpu = resolve_compile("auto", torch.device("cuda"), capability=capability, has_triton=found)
        assert gpu.why == why
        assert gpu.on == gpu.lenient == (why == "auto: on this GPU")


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the compiler gave up")


@pytest.mark.parametrize("lenient", [True, False], ids=["auto", "true"])
def test_what_cannot_be_compiled(lenient: bool, fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled = Compiled(CompileSection(backend="broken"), lenient=lenient)
    model, loss = nn.Linear(2, 1), loss_named("mse", "regression")
    batch = {"inputs": torch.randn(3, 2), "targets": torch.randn(3, 1)}
    expected = gradients(model, loss, batch, inside=False)
    compute_loss_inside(model, loss)
    torch._dynamo.register_backend(broken, name="broken")
    try:
        compile_model(model, compiled)
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("broken")
    if not lenient:
        with pytest.raises(Exception, match="the compiler gave up"):
            gradients(model, loss, batch, inside=True)
        return
    for ours, theirs in zip(gradients(model, loss, batch, inside=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    caplog.clear()
    warn_of_failures(compiled)
    assert "train.compile: auto: what could not be compiled runs as it is" in caplog.text
    assert "the compiler gave up" in caplog.text
    assert compiled.record()["graphs"] == 0
    assert "the compiler gave up" in compiled.record()["failures"][0]


def test_a_backend_that_there_is_not() -> None:
    with pytest.raises(UserError, match=r"train.compile.backend: torch has no 'inducter'; it has .*inductor"):
        compile_model(nn.Linear(2, 1), Compiled(CompileSection(backend="inducter")))


def test_outputs_of_a_model_that_is_not_given_targets_stay() -> None:
    model = WithAux()
    compute_loss_inside(model, loss_named("cross_entropy", "classification"))
    assert isinstance(model(torch.randn(2, 4)), dict)
    assert isinstance(calling_convention(model)(model, torch.randn(2, 4)), ModelOutput)
