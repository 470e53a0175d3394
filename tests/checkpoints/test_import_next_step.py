"""The step after an import is the other trainer's next step, or what makes it another one is said."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import yaml
from runs import write_recipe
from test_import import command
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from distrain.checkpoint import Reader, find_newest
from distrain.checkpoints.export import import_checkpoint
from distrain.checkpoints.export.opening import open_foreign
from distrain.config import UserError

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.never = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        for layer in (self.a, self.b, self.c):
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


class Data(torch.utils.data.Dataset):
    classes = ("x", "y", "z")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % 3


def splits():
    return {"train": Data(), "test": Data()}
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Any:
    """Return the file of a model and its data, imported as another trainer would."""
    path = tmp_path_factory.mktemp("theirs") / "trained_elsewhere.py"
    path.write_text(NET)
    content: dict[str, Any] = {"__name__": "trained_elsewhere", "__file__": str(path)}
    exec(compile(NET, str(path), "exec"), content)
    return path, content


def trained(theirs: Any, kind: type[torch.optim.Optimizer], steps: int, **options: Any) -> tuple[Any, Any]:
    """Return a model and its optimizer after steps on all of the data; biases and norms are its first group."""
    torch.manual_seed(0)
    model = theirs[1]["Net"]()
    model.never.weight.requires_grad = False
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [each for each in named if each[1].ndim < 2], "weight_decay": options.pop("bias_decay", 0.0)},
        {"params": [each for each in named if each[1].ndim > 1], "weight_decay": 0.1},
    ]
    optimizer = kind(groups, lr=0.01, **options)
    go_on(theirs, model, optimizer, steps)
    return model, optimizer


def go_on(theirs: Any, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    inputs, targets = zip(*(theirs[1]["Data"]()[index] for index in range(8)), strict=True)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.stack(inputs)), torch.tensor(targets)).backward()
        optimizer.step()


def next_step(theirs: Any, run: Path, tmp_path: Path, **optim: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Take the step after an import; return what was said, and the state after it."""
    step = int(find_newest(run / "checkpoints")[0].name.removeprefix("step-"))
    recipe = {
        "name": "next",
        "task": "classification",
        "data": {"name": f"{theirs[0]}:splits"},
        "model": {"name": f"{theirs[0]}:Net"},
        "optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "freeze": ["never.weight"], **optim},
        "schedule": {"name": "constant"},
        "batch": {"global": 8},
        "train": {"steps": step + 1, "precision": "fp32"},
    }
    said = command("train", write_recipe(tmp_path, yaml.safe_dump(recipe)), "--run-dir", run)
    with Reader(find_newest(run / "checkpoints")[0]) as reader:
        found = {
            name: torch.from_numpy(reader.read(name, 0, spec.numel).copy()).view(torch.float32).reshape(spec.shape)
            for name, spec in reader.manifest.specs.items()
            if spec.dtype == "F32"
        }
    return said, found


def check(model: nn.Module, optimizer: torch.optim.Optimizer, found: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[f"model/{name}"], tensor, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            torch.testing.assert_close(found[f"optimizer/{name}/{key}"], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "options", "optim"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, {"amsgrad": True}),
        pytest.param(torch.optim.Adam, {}, {"name": "adam"}, marks=pytest.mark.more),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, {"name": "sgd", "momentum": 0.9, "nesterov": True}),
        pytest.param(torch.optim.SGD, {}, {"name": "sgd"}, marks=pytest.mark.more),
    ],
)
def test_the_next_step_is_theirs(theirs, tmp_path, kind, options, optim):
    model, optimizer = trained(theirs, kind, 3, **options)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    torch.save(content, tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    said, found = next_step(theirs, tmp_path / "run", tmp_path, **optim)
    go_on(theirs, model, optimizer, 1)
    check(model, optimizer, found)
    assert "in the imported optimizer" not in said


def test_settings_that_make_another_step_of_it_are_said(theirs, tmp_path):
    model, optimizer = trained(theirs, torch.optim.AdamW, 2, betas=(0.8, 0.99), maximize=True, bias_decay=0.1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    said, _ = next_step(theirs, tmp_path / "run", tmp_path, lr=0.02)
    lines = sorted(line.strip() for line in said.splitlines() if "in the imported optimizer" in line)
    assert lines == [
        "optim: betas is [0.9, 0.999], and was [0.8, 0.99] in the imported optimizer",
        "optim: lr is 0.02, and was 0.01 in the imported optimizer",
        "optim: maximize is False, and was True in the imported optimizer",
        "optim: weight_decay is 0, and was 0.1 in the imported optimizer, for a.bias, b.bias, c.bias, head.bias, "
        "norm.bias and 1 more",
    ]


@pytest.mark.parametrize("kind", ["SGD", "Muon", "Adam", "AdamW", "RAdam", "Adagrad", "RMSprop", "Adamax"])
def test_optimizers_that_keep_the_same_are_told_apart(tmp_path, kind):
    weight = nn.Parameter(torch.ones(2, 2))
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)([("w", weight)], lr=0.1, **options)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    state = optimizer.state_dict()
    torch.save({"model": {"w": weight.detach()}, "optimizer": state}, tmp_path / "theirs.pt")
    assert import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run", step=1).optimizer == kind
    for group in state["param_groups"]:  # as that of another library, of which nothing is known
        for key in ("amsgrad", "dampening", "ns_steps", "decoupled_weight_decay", "lr_decay", "alpha", "betas"):
            group.pop(key, None)
    torch.save({"model": {"w": weight.detach()}, "optimizer": state}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match="does not show its class"):
        import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run", step=1)


def renamed(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    state["param_groups"][0]["param_names"] = names
    return state


def test_names_of_an_optimizer_are_those_of_the_model(tmp_path):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.named_parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    weights, state, path = layer.state_dict(), optimizer.state_dict(), tmp_path / "theirs.pt"

    def imported(models: list[str], names: list[str]) -> list[str]:
        content = {f"{prefix}{name}": value.clone() for prefix in models for name, value in weights.items()}
        torch.save({"model": content, "optimizer": renamed(state, names)}, path)
        with Reader(import_checkpoint(path, tmp_path / "run", overwrite=True).path) as reader:
            found = {name for name in reader.manifest.specs if name.endswith("exp_avg")}
            assert len(found) == 2
            return sorted({name.removesuffix("weight/exp_avg").removesuffix("bias/exp_avg") for name in found})

    own, wrapped = ["weight", "bias"], ["module.weight", "module.bias"]
    assert imported([""], own) == imported(["module."], own) == imported([""], wrapped) == ["optimizer/"]
    assert imported(["model."], own) == imported(["model."], wrapped) == ["optimizer/model."]
    # a frozen copy of the whole is beside what is trained
    assert imported(["module.", ""], wrapped) == ["optimizer/module."]
    assert imported(["teacher.", ""], own) == ["optimizer/"]
    for models, names in ((["student.", "teacher."], own), ([""], ["weight", "bais"]), (["model."], ["0", "1"])):
        with pytest.raises(UserError, match=r"the optimizer's state is of .*, and the model's tensors are .*--no-opt"):
            imported(models, names)


def test_several_optimizers_are_one_where_they_are_of_one_class(theirs, tmp_path):
    model, optimizer = trained(theirs, torch.optim.AdamW, 2)
    state = optimizer.state_dict()
    parts = []
    for group in state["param_groups"]:
        kept = {number: state["state"][number] for number in group["params"] if number in state["state"]}
        parts.append({"state": kept, "param_groups": [group]})
    torch.save({"state_dict": model.state_dict(), "optimizer_states": parts}, tmp_path / "theirs.ckpt")
    import_checkpoint(tmp_path / "theirs.ckpt", tmp_path / "run")
    _, found = next_step(theirs, tmp_path / "run", tmp_path)
    go_on(theirs, model, optimizer, 1)
    check(model, optimizer, found)
    for other, match in ((parts[0], "for the same parameters"), ({"state": {}, "param_groups": []}, "of AdamW and")):
        torch.save({"state_dict": model.state_dict(), "optimizer_states": [parts[0], other]}, tmp_path / "theirs.ckpt")
        with pytest.raises(UserError, match=f"it holds several optimizers.*{match}"):
            import_checkpoint(tmp_path / "theirs.ckpt", tmp_path / "run")


def test_state_of_one_of_several_models_is_refused(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    optimizer = torch.optim.AdamW(models[1].named_parameters())
    *models, optimizer = accelerator.prepare(*models, optimizer)
    accelerator.backward(models[1](torch.ones(1, 2)).sum())
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    with pytest.raises(UserError, match=r"several models, such as model_1.safetensors.*--no-optimizer"):
        import_checkpoint(tmp_path / "state", tmp_path / "run")
    done = import_checkpoint(tmp_path / "state", tmp_path / "run", with_optimizer=False)
    assert "further models: model_1.safetensors" in done.skipped


def test_numbers_in_distributed_checkpoints_are_no_names(theirs, tmp_path):
    model, optimizer = trained(theirs, torch.optim.AdamW, 2)
    state = optimizer.state_dict()
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=tmp_path / "named", no_dist=True)
    import_checkpoint(tmp_path / "named", tmp_path / "run")
    _, found = next_step(theirs, tmp_path / "run", tmp_path)
    go_on(theirs, model, optimizer, 1)
    check(model, optimizer, found)
    weights = {str(number): torch.ones(4) for number in range(10)}  # a ParameterList's, as it happens
    for group in state["param_groups"]:
        del group["param_names"]
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "unnamed", no_dist=True)
    with open_foreign(tmp_path / "unnamed") as source:
        assert not any(name.startswith("optimizer/") for name in source.names)
        assert any("numbers instead of the parameters' names" in what for what in source.skipped)


@pytest.mark.parametrize("flat", [False, True])
def test_state_by_name_is_taken_nested_and_flat(theirs, tmp_path, flat):
    model, optimizer = trained(theirs, torch.optim.AdamW, 3)
    options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flat)
    states = get_state_dict(model, optimizer, options=options)
    torch.save(dict(zip(("model", "optimizer"), states, strict=True)), tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    go_on(theirs, model, optimizer, 1)
    check(model, optimizer, next_step(theirs, tmp_path / "run", tmp_path)[1])


def test_state_that_was_written_over_other_state_is_refused(theirs, tmp_path):
    model, optimizer = trained(theirs, torch.optim.AdamW, 3)
    for state in optimizer.state.values():  # as torch's FSDP1 gives it for whole state on CPUs
        state["exp_avg"] = state["exp_avg_sq"]
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=r"exp_avg and .*/exp_avg_sq are one tensor"):
        import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run", with_optimizer=False)


def test_an_import_without_an_optimizer_says_what_to_do(theirs, tmp_path):
    model, _ = trained(theirs, torch.optim.AdamW, 3)
    torch.save({"model": model.state_dict(), "step": 3}, tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    with pytest.raises(AssertionError, match=r"; start a new run with model\.weights set to the model that"):
        next_step(theirs, tmp_path / "run", tmp_path)


def test_state_without_a_step_needs_one(theirs, tmp_path):
    model, optimizer = trained(theirs, torch.optim.SGD, 1, momentum=0.9)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=r"the optimizer's state and no number of steps.*--step"):
        import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    assert import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run", step=0).step == 0


def test_an_average_of_other_tensors_is_none(tmp_path):
    weight = torch.ones(2)
    for number, (average, kept) in enumerate(
        [({"a": weight, "b": weight.clone()}, ["a"]), ({"decay": weight[:1]}, [])]
    ):
        torch.save({"model": {"a": weight, "b": weight}, "ema": average}, tmp_path / "theirs.pt")
        done = import_checkpoint(tmp_path / "theirs.pt", tmp_path / f"run-{number}")
        with Reader(done.path) as reader:
            found = [name for name in reader.manifest.tensors if name.startswith("ema/")]
        assert found == [f"ema/{name}" for name in kept]
        assert ("the average: decay is no tensor of the model's" in done.skipped) is not bool(kept)


@pytest.mark.parametrize("named", [True, False])
def test_folders_of_the_trainer(theirs, tmp_path, named):
    model, optimizer = trained(theirs, torch.optim.SGD, 2, momentum=0.9)
    state = optimizer.state_dict()
    for group in state["param_groups"] if not named else ():
        del group["param_names"]
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text('{"epoch": 2.0, "global_step": 2, "max_steps": 4}')
    done = import_checkpoint(tmp_path, tmp_path / "run")
    assert (done.step, done.optimizer) == (2, "SGD" if named else None)
    assert any("numbers instead of" in what for what in done.skipped) is not named


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "weights.pt"])
def test_a_folder_of_one_file_says_what_else_is_in_it(tmp_path, name):
    """As that of the Trainer with peft, which keeps the adapters alone under a name of their own."""
    folder, tensors = tmp_path / "checkpoint-20", {"base_model.model.a.lora_A.weight": torch.ones(2, 3)}
    folder.mkdir()
    if name.endswith(".pt"):
        torch.save(tensors, folder / name)
    else:
        safetensors.torch.save_file(tensors, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 20}')
    for other in ("adapter_config.json", "average.npz"):
        (folder / other).write_bytes(b"{}")
    done = import_checkpoint(folder, tmp_path / "run")
    assert done.step == 20
    assert [each for each in done.skipped if "file" in each] == ["other files: average.npz"]


def test_state_of_each_weight_has_the_shape_of_its_parameter(tmp_path):
    """Held for every optimizer of torch: their fused kernels do not look at shapes."""
    tried = set()
    for kind in vars(torch.optim).values():
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
            continue
        weight = nn.Parameter(torch.ones(2, 3))
        accepted = inspect.signature(kind).parameters
        options = {"momentum": 0.9, "amsgrad": True, "centered": True}
        optimizer = kind([("w", weight)], lr=0.1, **{key: options[key] for key in options.keys() & accepted.keys()})
        weight.grad = torch.ones(2, 3)
        try:
            optimizer.step()
        except (RuntimeError, TypeError):  # those that take sparse gradients, or a closure, alone
            continue
        state = optimizer.state_dict()
        for key, value in state["state"][0].items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                broken = copy.deepcopy(state)
                broken["state"][0][key] = torch.ones(3)
                torch.save({"model": {"w": weight.detach()}, "optimizer": broken}, tmp_path / "theirs.pt")
                with pytest.raises(UserError, match=rf"the optimizer's {key} of w has the shape \[3\]"):
                    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run", step=1, optimizer=kind.__name__)
                tried.add(kind.__name__)
    assert tried >= {"SGD", "AdamW", "NAdam", "Adadelta", "ASGD", "Rprop", "RMSprop", "Adagrad", "Adamax", "Muon"}
