"""What is imported can be trained on: as weights to start from, and as the state that a run goes on from."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import foreign_folders
import pytest
import safetensors.torch
import torch
from runs import train, write_recipe
from typer.testing import CliRunner

from distrain.checkpoint import Reader, find_newest, verify
from distrain.checkpoints.export import export, import_checkpoint
from distrain.checkpoints.export.companion_files import keep_companions
from distrain.cli.main import app
from distrain.config import UserError
from distrain.datasets.tokens import tokenize_corpus
from distrain.networks.weights import load_weights

RECIPE = """
name: going-on
task: classification
data: {name: iris, split: [0.8, 0.2]}
model: {name: mlp, hidden: [8]}
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.1}
schedule: {name: constant}
batch: {global: 10}
train: {steps: 6, precision: fp32}
checkpoint: {every: 3 steps, keep: 10, async: false}
"""


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize("kind", ["zero1", "zero3", "fsdp", "dcp"])
def test_a_folder_is_a_file_of_weights(kind, written, tmp_path):
    path = written(kind).path / ("FULL_STATE_DICT" if kind == "fsdp" else "")
    if kind == "dcp":
        with pytest.raises(UserError, match=r"no tensor of .* fits the model"):
            load_weights(foreign_folders.build_model(), path)
        return
    done = import_checkpoint(path, tmp_path / "run")
    one = torch.load(export(path, tmp_path / "model.pt").paths[0])
    for folder in (path, done.path, tmp_path / "run"):
        model = foreign_folders.build_model()
        torch.nn.init.zeros_(model.embed.weight)
        assert not load_weights(model, folder).problems
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, one[name])


def test_weights_in_a_folder_that_is_none(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UserError, match=r"model\.weights: .* is not a checkpoint in a known format"):
        load_weights(foreign_folders.build_model(), tmp_path)


def saved_elsewhere(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint of distrain as a trainer of one's own would: names, torch's state of the optimizer, a step."""
    with Reader(checkpoint) as reader:
        tensors = {}
        for name, spec in reader.manifest.specs.items():
            raw = torch.from_numpy(reader.read(name, 0, spec.numel).copy())
            tensors[name] = raw.view(torch.float32).reshape(spec.shape)
    state: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
            state.setdefault(parameter, {})[key] = tensor
    names = list(state)
    steps: dict[str, object] = {"step": 3}  # a number, as before PyTorch 1.12
    state[names[0]] |= steps
    torch.save(
        {
            "model": {f"module.{n.removeprefix('model/')}": t for n, t in tensors.items() if n.startswith("model/")},
            "optimizer": {
                "state": {index: state[name] for index, name in enumerate(names)},
                "param_groups": [
                    {
                        "lr": 0.5,
                        "betas": (0.9, 0.999),
                        "amsgrad": False,
                        "decoupled_weight_decay": True,
                        "params": [*range(len(names))],
                        "param_names": names,
                    }
                ],
            },
            "global_step": 3,
            "scheduler": {"last_epoch": 3},
        },
        out,
    )


def test_a_run_resumes_from_an_import_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, RECIPE)
    command("train", recipe, "--run-dir", "straight")
    saved_elsewhere(tmp_path / "straight" / "checkpoints" / "step-00000003", tmp_path / "theirs.pt")
    said = command("checkpoint", "import", "theirs.pt", "again")
    assert "step 3: 4 parameters, 0 buffers, the state of AdamW" in said
    assert "not imported: theirs.pt: scheduler" in said
    assert "again/checkpoints/step-00000003" in said
    command("train", recipe, "--run-dir", "again")
    done = CliRunner().invoke(
        app, ["checkpoint", "diff", "straight/checkpoints/step-00000006", "again/checkpoints/step-00000006"]
    )
    assert done.exit_code == 0, done.output
    assert "the state of training is identical, bit for bit" in done.output


@pytest.fixture
def theirs():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.5)
    for _ in range(3):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize(
    ("recorded", "options", "expected"),
    [
        ({}, {}, 3),
        ({"iter": 1, "global_step": 3}, {}, 3),
        ({"global_step": 12}, {}, "it records global_step 12, and its optimizer counted 3 steps; expected one number"),
        ({"step": 2, "epoch": 1}, {}, "it records step 2, and its optimizer counted 3 steps"),
        ({"step": 2, "iter": 8}, {}, "it records step 2 and iter 8, and its optimizer counted 3 steps"),
        ({"step": 2}, {"step": 4}, 4),
    ],
)
def test_steps_that_are_counted_in_several_ways(theirs, tmp_path, recorded, options, expected):
    torch.save(theirs | recorded, tmp_path / "theirs.pt")
    if isinstance(expected, int):
        assert import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run", **options).step == expected
        return
    with pytest.raises(UserError, match=expected):
        import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    assert export(tmp_path / "theirs.pt", tmp_path / "out.pt").tensors == 2


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (("ema",), ""),
        (("ema", "state_dict"), "the moving average is ema.state_dict"),
        (("ema", "shadow"), "the moving average is ema.shadow"),
        (("callbacks", "Averaging", "ema_state_dict"), "the moving average is callbacks.Averaging.ema_state_dict"),
        (("optimizer_states", "ema"), None),  # what an optimizer keeps under such a name is its own
    ],
)
def test_an_average_is_found_deeper_inside(theirs, tmp_path, where, said):
    average = {name: tensor + 1 for name, tensor in theirs["model"].items()}
    content = average if where[-1] == "ema" else average | {"decay": 0.9}
    for key in reversed(where):
        content = {key: content, "updates": torch.tensor(3)}
    torch.save({"model": theirs["model"]} | content, tmp_path / "theirs.pt")
    done = import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    with Reader(done.path) as reader:
        found = [name for name in reader.manifest.specs if name.startswith("ema/")]
    assert sorted(found) == ([] if said is None else ["ema/bias", "ema/weight"])
    assert not said or said in done.notes


def test_lightnings_average_is_not_taken_for_the_weights(theirs, tmp_path):
    average = {name: tensor + 1 for name, tensor in theirs["model"].items()}
    content = {"state_dict": average, "current_model_state": theirs["model"], "averaging_state": {}, "global_step": 3}
    torch.save(content | {"optimizer_states": [theirs["optimizer"]]}, tmp_path / "last.ckpt")
    for ema, expected in ((False, theirs["model"]), (True, average)):
        found = torch.load(export(tmp_path / "last.ckpt", tmp_path / f"{ema}.pt", ema=ema).paths[0])
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # a model that starts from it has what Lightning's load_from_checkpoint gives
    model = torch.nn.Linear(3, 2)
    report = load_weights(model, tmp_path / "last.ckpt")
    assert torch.equal(model.weight, average["weight"])
    assert report.notes == (
        "state_dict is taken, which is the moving average; current_model_state are the weights beside it",
    )
    torch.save({"model": theirs["model"], "ema": average}, tmp_path / "both.pt")
    report = load_weights(model, tmp_path / "both.pt")
    assert torch.equal(model.weight, theirs["model"]["weight"])
    assert report.notes == ("the weights of both.pt, not their moving average, which `distrain export --ema` writes",)
    # of an import no recipe is known, and so nothing is said beside its weights
    done = import_checkpoint(tmp_path / "last.ckpt", tmp_path / "run")
    command("export", done.path, "-o", tmp_path / "folder")
    assert os.listdir(tmp_path / "folder") == ["model.safetensors"]


def test_an_optimizers_state_is_held_against_the_weights(theirs, tmp_path):
    state = theirs["optimizer"]["state"]
    state[1]["exp_avg"] = state[1]["exp_avg"].bfloat16()
    torch.save(theirs, tmp_path / "theirs.pt")
    done = import_checkpoint(tmp_path / "theirs.pt", tmp_path / "run")
    with Reader(done.path) as reader:
        assert reader.spec("optimizer/bias/exp_avg").dtype == "F32"
        raw = torch.from_numpy(reader.read("optimizer/bias/exp_avg", 0, 2).copy()).view(torch.float32)
    assert torch.equal(raw, state[1]["exp_avg"].float())
    assert any("lr 0.5" in note for note in done.notes)
    lacking = theirs | {"optimizer": theirs["optimizer"] | {"state": {1: state[1]}}}
    torch.save(lacking, tmp_path / "theirs.pt")
    done = import_checkpoint(tmp_path / "theirs.pt", tmp_path / "lacking")
    assert "no state of the optimizer for weight: frozen, or it starts anew" in done.notes
    swapped = theirs | {"optimizer": theirs["optimizer"] | {"state": {0: state[1], 1: state[0]}}}
    torch.save(swapped, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=r"exp_avg of weight has the shape \[2\], and weight has \[2, 3\]"):
        import_checkpoint(tmp_path / "theirs.pt", tmp_path / "swapped")


def test_an_import_without_the_optimizers_state_is_no_state_to_go_on_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, RECIPE)
    command("train", recipe, "--run-dir", "straight")
    saved_elsewhere(tmp_path / "straight" / "checkpoints" / "step-00000003", tmp_path / "theirs.pt")
    command("checkpoint", "import", "theirs.pt", "again", "--no-optimizer")
    done = CliRunner().invoke(app, ["train", str(recipe), "--run-dir", "again"])
    assert done.exit_code != 0
    command("train", recipe, "model.weights=again", "--run-dir", "anew")
    assert find_newest(tmp_path / "anew" / "checkpoints")[0] is not None


def test_an_import_that_does_not_fit_says_how_its_weights_do(tmp_path):
    recipe = write_recipe(tmp_path, RECIPE)
    command("train", recipe, "--run-dir", tmp_path / "theirs", "train.steps=1")
    weights = safetensors.torch.load_file(tmp_path / "theirs" / "export" / "model.safetensors")
    narrow = {f"net.{name}": tensor.bfloat16() for name, tensor in weights.items()}
    torch.save({"state_dict": narrow}, tmp_path / "narrow.ckpt")
    imported = import_checkpoint(tmp_path / "narrow.ckpt", tmp_path / "in", step=3).path
    failed = CliRunner().invoke(app, ["train", str(recipe), "--run-dir", str(tmp_path / "in")])
    assert failed.exit_code == 1
    assert f"from its weights alone, with model.weights={imported}".replace(" ", "") in "".join(failed.output.split())
    command("train", recipe, "--run-dir", tmp_path / "new", f"model.weights={imported}", "train.steps=1")


def test_steps_and_folders(written, tmp_path):
    path = written("zero2").path
    assert import_checkpoint(path, tmp_path / "a", step=7).path.name == "step-00000007"
    assert import_checkpoint(path, tmp_path / "a").path.name == "step-00000003"
    with pytest.raises(UserError, match="exists already"):
        import_checkpoint(path, tmp_path / "a")
    import_checkpoint(path, tmp_path / "a", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir()) == ["step-00000003", "step-00000007"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    for out, match in (
        (tmp_path / "b", "holds files and is not a run"),
        (tmp_path / "b" / "mine", "is a file"),
        (tmp_path / "c.safetensors", "is not a run.s folder"),
        (tmp_path / "a" / "checkpoints" / "step-00000003", "is not a run.s folder"),
    ):
        with pytest.raises(UserError, match=match):
            import_checkpoint(path, out)


def test_names_that_do_not_hold(written, tmp_path):
    path = written("fsdp").path / "FULL_STATE_DICT"
    for options, match in (
        ({"tied": {"head.weight": "embed.wieght"}}, "no tensor 'embed.wieght'.*did you mean 'embed.weight'"),
        ({"tied": {"body.1.weight": "body.1.bias"}}, "are not tied: their elements differ"),
        ({"buffers": ["nothing.*"]}, "matches no tensor"),
        ({"step": -1}, "expected 0 or more"),
        ({"format": "deepspeed"}, "optim_states"),
    ):
        with pytest.raises(UserError, match=match):
            import_checkpoint(path, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds no optimizer's state"):
        import_checkpoint(written("plain").path / "bin" / "pytorch_model.bin", tmp_path / "out", optimizer="AdamW")


def test_from_pretrained_opens_the_export_of_a_run(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    config = "{model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 2, n_positions: 16}"
    recipe = write_recipe(
        tmp_path,
        "name: gpt\ntask: language_modeling\n"
        "data: {name: text, path: text.txt, seq_len: 16, split: [0.8, 0.1, 0.1]}\n"
        f"model: {{name: 'transformers:AutoModelForCausalLM', config: {config}}}\n"
        "batch: {global: 4}\ntrain: {steps: 2, precision: fp32}\n",
    )
    command("train", recipe, "--run-dir", "run")
    command("export", "run", "-o", "out", "--shards", "3KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    found = []
    for folder in ("run/export", "out"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model) is GPT2LMHeadModel
        assert model.config.n_embd == 8
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor)
    # and in again, as any folder of Hugging Face's is
    assert "transformer.wte.weight" in found[0]
    command("checkpoint", "import", "out", "in")
    with Reader(find_newest(tmp_path / "in" / "checkpoints")[0]) as reader:
        assert reader.manifest.scalars["transformers_config"]


BESIDE = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
    "special_tokens_map.json": "{}",
    "added_tokens.json": '{"<a>": 7}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "generation_config.json": '{"max_new_tokens": 7}',
    "preprocessor_config.json": '{"size": 4}',
    "vocab.txt": "a\nb\n",
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run of a transformers model that was stopped after a step, and whose base folder is gone since."""
    from transformers import GPT2Config, GPT2LMHeadModel

    place = tmp_path_factory.mktemp("tuned")
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    tokenize_corpus([place / "text.txt"], place / "tokens", eos=False)
    base = place / "base"
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=300, id2label={0: "no", 1: "yes"})
    GPT2LMHeadModel(config).save_pretrained(base)
    for name, text in BESIDE.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    (base / "optimizer.pt").write_text("nothing that a model needs")
    recipe = write_recipe(
        place,
        "name: gpt\ntask: language_modeling\n"
        f"data: {{name: tokens, path: {place}/tokens, seq_len: 16, split: [0.8, 0.1, 0.1]}}\n"
        f"model: {{name: 'transformers:AutoModelForCausalLM', path: {base}}}\n"
        "batch: {global: 4}\ntrain: {steps: 3, precision: fp32}\n",
    )
    train(1, recipe, place / "run", stop_after=1)
    shutil.rmtree(base)
    train(1, recipe, place / "run")
    return place / "run"


def beside(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(("model", "config.json"))
    }


def test_an_export_has_what_lay_beside_the_weights(tuned, tmp_path):
    assert beside(tuned / "export") == BESIDE, "of a run that was resumed without the base folder"
    export(tuned / "checkpoints" / "step-00000003", tmp_path / "one")
    export(find_newest(tuned / "checkpoints")[0], tmp_path / "shards", shards="8KB")
    assert beside(tmp_path / "one") == beside(tmp_path / "shards") == BESIDE
    assert json.loads((tmp_path / "one" / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    # out of what was exported, and through an import, it comes as well
    export(tmp_path / "shards", tmp_path / "again")
    done = import_checkpoint(tmp_path / "one", tmp_path / "in")
    export(done.path, tmp_path / "back")
    import_checkpoint(tmp_path / "one", tmp_path / "in", step=1)
    assert beside(tmp_path / "again") == beside(tmp_path / "back") == BESIDE


def test_config_json_names_the_dtype_of_the_weights(tuned, tmp_path):
    for given, expected in (("bf16", "bfloat16"), ("fp16", "float16"), (None, "float32")):
        export(tuned / "checkpoints" / "step-00000003", tmp_path / expected, dtype=given)
        assert json.loads((tmp_path / expected / "config.json").read_text())["dtype"] == expected
    config = json.loads((tmp_path / "float32" / "config.json").read_text())
    (tmp_path / "float32" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    export(tmp_path / "float32", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"


def test_a_processor_that_normalises_otherwise_than_the_run_is_said(tuned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    found = []
    for mean in ([0.5, 0.5, 0.5], None):
        processor = {} if mean is None else {"image_mean": mean, "image_std": mean}
        (run / "transformers" / "preprocessor_config.json").write_text(json.dumps(processor | {"do_normalize": True}))
        found.append(export(run / "checkpoints" / "step-00000003", tmp_path / f"out{len(found)}").notes)
    assert "(mean and std [0.5] and [0.5], in the run None and None): write the run's into it" in found[0][0]
    assert not found[1]


def test_an_export_reports_what_it_omits(tuned, tmp_path):
    done = export(tuned / "checkpoints" / "step-00000003", tmp_path / "gpt.safetensors")
    assert os.listdir(tmp_path) == ["gpt.safetensors"]
    assert any("config.json, added_tokens.json" in note and "and 5 more" in note for note in done.notes)
    # a checkpoint that was taken out of its run
    shutil.copytree(tuned / "checkpoints" / "step-00000003", tmp_path / "else" / "where" / "step-00000003")
    done = export(tmp_path / "else" / "where" / "step-00000003", tmp_path / "out")
    assert any(note.startswith("skipped: ") and "and 4 more" in note for note in done.notes)
    assert [path.name for path in done.paths] == ["model.safetensors", "config.json"]
    # what somebody has put there is not written over, unless that is asked for
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "vocab.txt").write_text("mine")
    with pytest.raises(UserError, match=r"vocab\.txt exists already"):
        export(tuned / "checkpoints" / "step-00000003", tmp_path / "own")
    (tmp_path / "own" / "vocab.txt").write_text(BESIDE["vocab.txt"])
    export(tuned / "checkpoints" / "step-00000003", tmp_path / "own")


def test_what_is_kept_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.checkpoints.export.companion_files._MAX_BYTES", 10)
    (tmp_path / "base").mkdir()
    for name, size in (("tokenizer.json", 20), ("vocab.txt", 3), ("model.safetensors", 5)):
        (tmp_path / "base" / name).write_text("x" * size)
    (said,) = keep_companions(tmp_path / "base", tmp_path / "run")
    assert said.endswith("exports will not have: tokenizer.json")
    assert os.listdir(tmp_path / "run" / "transformers") == ["vocab.txt"]


@pytest.mark.parametrize("hidden", [[], ["zlib_ng"]])
def test_checksums_are_those_of_zip_archives(hidden):
    code = (
        f"import sys; sys.modules |= dict.fromkeys({hidden}); from distrain.checkpoints.sources import Crc32, crc32\n"
        "hashed = Crc32(); hashed.update(b'1234'); hashed.update(b'56789'); print(hashed.value, crc32.__module__)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert found == [str(0xCBF43926), "zlib" if hidden else "zlib_ng.zlib_ng"]  # what every CRC-32 has for these bytes


def test_a_failed_import_leaves_nothing(written, tmp_path, monkeypatch):
    path = written("zero2").path
    import_checkpoint(path, tmp_path / "run", step=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="the disk is full"):
        import_checkpoint(path, tmp_path / "run", step=2)
    with pytest.raises(UserError, match="the disk is full"):
        import_checkpoint(path, tmp_path / "run", step=1, overwrite=True)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000001"]
    assert verify(tmp_path / "run" / "checkpoints" / "step-00000001") == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="and the disk has 100 left"):
        import_checkpoint(path, tmp_path / "run", step=2)
