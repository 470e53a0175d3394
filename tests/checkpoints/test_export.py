"""Exports hold exactly the checkpoint's model, in the layouts that others read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_state import DESCRIBED, SPECS, ThreadWorld, make_state, save_world
from places import IMPORTABLE

from distrain.checkpoint import LocalCommunicator, Piece, Saver, TensorSpec
from distrain.checkpoints.export import copying, export, find_source, new_files, streams, windows
from distrain.config import UserError

PLAIN = [name.removeprefix("model/") for name in SPECS if name.startswith("model/")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("checkpoints"), 3, 7, make_state(4), seed=4)[0].path


def assert_exported(tensors: dict[str, torch.Tensor]) -> None:
    state = make_state(4)
    assert sorted(tensors) == sorted([*PLAIN, "tied.weight"])
    for name, tensor in tensors.items():
        source = "model/layer.weight" if name == "tied.weight" else f"model/{name}"
        assert tuple(tensor.shape) == SPECS[source].shape
        assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == state[source].tobytes()


def test_one_file(checkpoint, tmp_path):
    result = export(checkpoint, tmp_path / "new" / "folder")
    assert result.paths == (tmp_path / "new" / "folder" / "model.safetensors",)
    assert result.tensors == len(PLAIN) + 1
    assert_exported(safetensors.torch.load_file(result.paths[0]))
    with safetensors.safe_open(result.paths[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert os.listdir(tmp_path / "new" / "folder") == ["model.safetensors"]


def test_strict_loading_of_a_tied_model(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    raw = np.arange(15, dtype="f4").view(np.uint8)
    specs = {"model/embed.weight": TensorSpec((5, 3), "F32", "parameter")}
    described = DESCRIBED | {"aliases": {"model/head.weight": "model/embed.weight"}}
    saved = Saver(tmp_path / "c", LocalCommunicator()).save(
        1, specs, [Piece("model/embed.weight", 0, raw)], **described
    )
    for suffix in ("safetensors", "pt"):
        path = export(saved.path, tmp_path / f"model.{suffix}").paths[0]
        tensors = safetensors.torch.load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
        model = Tied()
        model.load_state_dict(tensors, strict=True)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight.flatten(), torch.arange(15.0))
    assert tensors["head.weight"].data_ptr() == tensors["embed.weight"].data_ptr()


@pytest.mark.parametrize("buffer", [16, 24, 1 << 18])
@pytest.mark.parametrize("threads", [1, 3])
def test_small_buffers_and_threads(checkpoint, tmp_path, monkeypatch, buffer, threads):
    monkeypatch.setattr(streams, "BUFFER", buffer)
    monkeypatch.setattr(copying, "THREADS", threads)
    expected = safetensors.torch.load_file(export(checkpoint, tmp_path / "one").paths[0])
    assert_exported(expected)
    half = safetensors.torch.load_file(export(checkpoint, tmp_path / "two", dtype="bf16").paths[0])
    for name, tensor in expected.items():
        assert torch.equal(half[name], tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
    assert open_files_of(tmp_path.parent) == []


def open_files_of(folder: Path) -> list[str]:
    """Return what this process has open there."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(descriptor))
    return [link for link in links if link.startswith(str(folder))]


@pytest.fixture(params=[None, 40, windows.WINDOW], ids=["in buffers", "in small windows", "in windows"])
def small(request, monkeypatch):
    """Read files one by one through buffers, or several at a time into windows of so many bytes."""
    monkeypatch.setattr(windows, "FEW", 1 if request.param else 1000)
    monkeypatch.setattr(windows, "WINDOW", request.param or windows.WINDOW)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"shards": 40}, {"ema": True}], ids=str)
def test_each_byte_is_read_once_and_hashed_as_it_passes(checkpoint, tmp_path, monkeypatch, options):
    monkeypatch.setattr(new_files, "_MAX_OPEN", 2)  # fewer than there are shards
    read = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        read.append((os.fstat(descriptor).st_ino, offset, count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    export(checkpoint, tmp_path / "out", **options)
    for file in checkpoint.glob("rank-*"):
        reached = 0
        for _, offset, count in sorted(each for each in read if each[0] == file.stat().st_ino):
            assert offset == reached
            reached += count
        assert reached == file.stat().st_size


def test_few_of_many_new_files_are_open_at_a_time(checkpoint, tmp_path, monkeypatch):
    out, opened = tmp_path / "out", []
    for call in ("pwrite", "pwritev"):
        write = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *given, write=write: opened.append(open_files_of(out)) or write(*given))
    expected = export(checkpoint, tmp_path / "one").paths[0]
    for limit in (1, 3, 128):
        monkeypatch.setattr(new_files, "_MAX_OPEN", limit)
        opened.clear()
        paths = export(checkpoint, out, shards=40, overwrite=True).paths
        assert len(paths) > 6
        assert 1 <= max(map(len, opened)) <= limit
        found = {}
        for path in paths[:-1]:
            found |= safetensors.torch.load_file(path)
        whole = safetensors.torch.load_file(expected)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_what_many_small_files_have_of_a_tensor_is_written_at_once(tmp_path, monkeypatch):
    ranks, rows = 32, 64
    specs = {f"model/t{n}": TensorSpec((rows, 3), "F32", "parameter") for n in range(5)}
    values = {name: np.arange(rows * 3, dtype=np.float32) + 1000 * n for n, name in enumerate(specs)}

    def rank(comm):
        share = rows * 3 // ranks
        start = comm.rank * share
        pieces = [
            Piece(name, start, value[start : start + share].view(np.uint8), copied=True)
            for name, value in values.items()
        ]
        return Saver(tmp_path, comm).save(1, specs, pieces, **DESCRIBED | {"aliases": {}}).path

    path = ThreadWorld(ranks).run(rank)[0]
    calls = []
    for call in ("pwrite", "pwritev"):
        write = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *given, write=write: calls.append(given) or write(*given))
    monkeypatch.setattr(windows, "_MAX_VIEWS", 24)
    tensors = safetensors.torch.load_file(export(path, tmp_path / "out").paths[0])
    assert all(np.array_equal(tensors[name.removeprefix("model/")].numpy().ravel(), values[name]) for name in specs)
    # the header, and each run of tensors that lie side by side, cut where a call takes no more
    assert len(calls) <= 1 + 1 + ranks * len(specs) // 24


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    for call in ("pwrite", "pwritev"):
        write = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *given, write=write: write(given[0], _shortened(given[1]), given[2]))
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    views = [memoryview(text.encode()) for text in ("abc", "", "defgh", "i", "jk")]
    for count in range(1, len(views) + 1):
        new_files.write_at(descriptor, views[:count], 2)
        assert os.pread(descriptor, 99, 2) == b"".join(views[:count])
    os.close(descriptor)


def _shortened(data):
    """Return the first bytes of what a call is to write."""
    return [b"".join(data)[:4]] if isinstance(data, list) else data[:1]


def test_tensors_side_by_side_are_written_at_once(tmp_path, monkeypatch):
    count = 200
    specs = {f"model/t{n:03d}": TensorSpec((6,), "F32", "parameter") for n in range(count)}
    pieces = [Piece(name, 0, np.full(24, n, np.uint8), copied=True) for n, name in enumerate(specs)]
    path = Saver(tmp_path, LocalCommunicator()).save(1, specs, pieces, **DESCRIBED | {"aliases": {}}).path
    written = []
    for call in ("pwrite", "pwritev"):
        write = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *given, write=write: written.append(given) or write(*given))
    tensors = safetensors.torch.load_file(export(path, tmp_path / "out").paths[0])
    assert len(written) == 2  # the header, and all of them
    assert [int(tensors[f"t{n:03d}"].view(torch.uint8)[0]) for n in range(count)] == list(range(count))


@pytest.mark.parametrize("dtype", ["bf16", "float16", "fp32", "FP64"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_dtypes_are_those_of_torch(checkpoint, tmp_path, dtype, suffix):
    types = {"bf16": torch.bfloat16, "float16": torch.float16, "fp32": torch.float32, "FP64": torch.float64}
    path = export(checkpoint, tmp_path / f"m.{suffix}", dtype=dtype).paths[0]
    tensors = safetensors.torch.load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    kept = safetensors.torch.load_file(export(checkpoint, tmp_path / "kept").paths[0])
    for name, tensor in kept.items():
        expected = tensor.to(types[dtype]) if tensor.is_floating_point() else tensor
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected)


def test_float8_is_not_converted_and_that_is_said(tmp_path):
    weights = {"w": torch.ones(3).to(torch.float8_e4m3fn), "v": torch.ones(3)}
    safetensors.torch.save_file(weights, tmp_path / "theirs.safetensors")
    done = export(tmp_path / "theirs.safetensors", tmp_path / "out.safetensors", dtype="bf16")
    assert done.notes[-1] == "not converted, as float8 may have a scale elsewhere: w"
    assert safetensors.torch.load_file(done.paths[0])["v"].dtype == torch.bfloat16


def test_values_too_large_for_the_dtype(tmp_path):
    raw = np.array([1.0, np.inf, 70000.0], "f4").view(np.uint8)
    specs = {"model/w": TensorSpec((3,), "F32", "parameter")}
    saved = Saver(tmp_path / "c", LocalCommunicator()).save(
        1, specs, [Piece("model/w", 0, raw)], **(DESCRIBED | {"aliases": {}})
    )
    for suffix in ("safetensors", "pt"):
        with pytest.raises(UserError, match=r"model/w has values that are too large for F16 \(at least 1\)"):
            export(saved.path, tmp_path / f"out.{suffix}", dtype="fp16")
    assert sorted(os.listdir(tmp_path)) == ["c"]


def test_shards(checkpoint, tmp_path):
    result = export(checkpoint, tmp_path, shards="400B")
    assert len(result.paths) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": result.nbytes}
    tensors = {}
    for path in result.paths[:-1]:
        found = safetensors.torch.load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(found)
        assert len(found) == 1 or sum(tensor.nbytes for tensor in found.values()) <= 400
        tensors |= found
    assert_exported(tensors)
    assert export(checkpoint, tmp_path / "whole", shards="5GB").paths == (tmp_path / "whole" / "model.safetensors",)


def test_another_cut_leaves_nothing_of_the_one_before(checkpoint, tmp_path):
    export(checkpoint, tmp_path)
    (tmp_path / "model-card.md").write_text("mine")
    with pytest.raises(UserError, match=r"model\.safetensors exists already"):
        export(checkpoint, tmp_path, shards=400)
    for shards in (400, 300, None):
        result = export(checkpoint, tmp_path, shards=shards, overwrite=True)
        assert sorted(os.listdir(tmp_path)) == sorted([*(path.name for path in result.paths), "model-card.md"])


def test_transformers_reads_the_shards(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    specs = {f"model/{name}": TensorSpec(tuple(tensor.shape), "F32", "parameter") for name, tensor in state.items()}
    pieces = [Piece(f"model/{n}", 0, t.reshape(-1).view(torch.uint8).numpy()) for n, t in state.items()]
    saved = Saver(tmp_path / "c", LocalCommunicator()).save(1, specs, pieces, **(DESCRIBED | {"aliases": {}}))
    assert len(export(saved.path, tmp_path / "hf", shards="10KB").paths) > 3
    config.save_pretrained(tmp_path / "hf")
    loaded = BertModel.from_pretrained(tmp_path / "hf")
    for name, tensor in state.items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_moving_average(checkpoint, tmp_path):
    tensors = safetensors.torch.load_file(export(checkpoint, tmp_path, ema=True).paths[0])
    state = make_state(4)
    for name in ("layer.weight", "tied.weight"):
        assert tensors[name].numpy().tobytes() == state["ema/layer.weight"].tobytes()
    assert tensors["wide"].numpy().tobytes() == state["model/wide"].tobytes()


def test_no_moving_average(tmp_path):
    specs = {"model/w": TensorSpec((), "F32", "parameter")}
    described = DESCRIBED | {"aliases": {}}
    saved = Saver(tmp_path / "c", LocalCommunicator()).save(
        1, specs, [Piece("model/w", 0, np.zeros(4, np.uint8))], **described
    )
    with pytest.raises(UserError, match=r"train\.ema was off"):
        export(saved.path, tmp_path / "out", ema=True)


def test_folders_of_others_may_be_named_after_steps(tmp_path):
    folder = tmp_path / "step-1000"
    folder.mkdir()
    safetensors.torch.save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    path, format = find_source(folder)
    assert format is not None
    for said in (format, None):
        out = export(path, tmp_path / "out.safetensors", format=said, overwrite=True).paths[0]
        assert torch.equal(safetensors.torch.load_file(out)["w"], torch.ones(2))


def averaged_file(tmp_path, change=lambda content: None, momentum=0.9):
    """Write what a trainer with torch's AveragedModel saves; return the file, the model and the average."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=momentum)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    content = {"model": model.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}
    change(content)
    torch.save(content, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt", model, average


def test_averages_that_torch_took(tmp_path):
    path, model, average = averaged_file(tmp_path)
    done = export(path, tmp_path / "out", ema=True)
    tensors = safetensors.torch.load_file(done.paths[0])
    expected = average.module.state_dict()
    assert sorted(tensors) == sorted(expected)
    assert not torch.equal(expected["0.weight"], model.state_dict()["0.weight"])
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor)
    assert not any("not averaged" in note for note in done.notes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["ema"].update({"module.3.weight": torch.zeros(1)}), r"has 3\.weight, which the model has not"),
        (lambda c: c.update(ema={f"shadow.{n}": t for n, t in c["model"].items()}), "which the model has not"),
        (
            lambda c: c["ema"].update({"module.2.bias": torch.zeros(3)}),
            r"of 2\.bias has the shape \[3\], and it \[2\]; exp",
        ),
        (lambda c: c["ema"].pop("module.0.bias"), r"0\.bias was trained and has no moving average; exp"),
    ],
)
def test_averages_that_are_not_of_the_model(tmp_path, change, match):
    path, *_ = averaged_file(tmp_path, change)
    with pytest.raises(UserError, match=match):
        export(path, tmp_path / "out", ema=True)
    assert not (tmp_path / "out").exists()
    export(path, tmp_path / "out")


def test_what_has_no_average_is_reported(tmp_path):
    """Without momentum nothing shows whether a parameter was trained or frozen."""
    path, model, _ = averaged_file(tmp_path, lambda content: content["ema"].pop("module.0.bias"), momentum=0)
    done = export(path, tmp_path / "out", ema=True)
    assert "not averaged, and taken as they are: 0.bias" in done.notes
    assert torch.equal(safetensors.torch.load_file(done.paths[0])["0.bias"], model.state_dict()["0.bias"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in ("new", "there") for options in ({}, {"dtype": "bf16"}, {"shards": 40}, {"ema": True})]
    + [("new/model.pt", {}), ("new/model.pt", {"dtype": "bf16"})],
    ids=str,
)
def test_a_changed_byte_anywhere_is_refused_and_nothing_is_left(checkpoint, tmp_path, name, options):
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    there = tmp_path / "there" / "model.safetensors"
    there.parent.mkdir()
    there.write_text("mine")
    for file in sorted(copy.glob("rank-*")):
        good = file.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        for place in (0, 9, header - 1, header, (header + len(good)) // 2, len(good) - 1):
            raw = bytearray(good)
            raw[place] ^= 1
            file.write_bytes(raw)
            with pytest.raises(UserError, match=re.escape(file.name)):
                export(copy, tmp_path / name, overwrite=True, **options)
            assert sorted(each.name for each in tmp_path.iterdir()) == sorted([copy.name, "there"])
            assert (os.listdir(there.parent), there.read_text()) == (["model.safetensors"], "mine")
        file.write_bytes(good[:-1])
        with pytest.raises(UserError, match=f"{len(good) - 1} bytes, and {len(good)} were written"):
            export(copy, tmp_path / name, overwrite=True, **options)
        raw = bytearray(good)
        raw[-1] ^= 1
        file.write_bytes(raw)
    with pytest.raises(UserError, match="its bytes are not those") as caught:
        export(copy, tmp_path / name, overwrite=True, **options)
    assert all(file.name in str(caught.value) for file in copy.glob("rank-*"))
    export(copy, tmp_path / "new", verify=False, **options)
    assert open_files_of(tmp_path) == []


def test_files_that_are_there_are_kept(checkpoint, tmp_path):
    out = tmp_path / "model.safetensors"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already; choose another name, or --overwrite it"):
        export(checkpoint, out)
    assert out.read_text() == "mine"
    export(checkpoint, out, overwrite=True)
    assert_exported(safetensors.torch.load_file(out))
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_symbolic_links_are_not_followed(checkpoint, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = tmp_path / "model.safetensors"
    for target in (victim, tmp_path / "nothing"):
        out.symlink_to(target)
        for overwrite in (False, True):
            with pytest.raises(UserError, match="symbolic link"):
                export(checkpoint, out, overwrite=overwrite)
        out.unlink()
    assert victim.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_failure_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="the disk is full"):
        export(checkpoint, tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    assert open_files_of(tmp_path) == []


def test_leftovers_of_killed_exports_are_removed(checkpoint, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    from distrain.checkpoints.hiding import HOST

    (tmp_path / f".tmp-model.safetensors-{HOST}-{child.pid}-5-ab").write_text("x")
    (tmp_path / f".tmp-other.safetensors-{HOST}-{child.pid}-5-ab").write_text("x")
    export(checkpoint, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f".tmp-other.safetensors-{HOST}-{child.pid}-5-ab", "model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf17"}, r"no dtype 'bf17'.*did you mean 'bf16'"),
        ({"shards": "5 gigs"}, "'5 gigs' is not a size"),
        ({"shards": "0GB"}, "'0GB' is not a size"),
        ({"out": "model.onnx"}, r"'\.onnx' is not a format"),
        ({"out": "model.pt", "shards": 400}, "only safetensors files come in shards"),
    ],
)
def test_options_that_cannot_be(checkpoint, tmp_path, options, message):
    out = tmp_path / options.pop("out", "model.safetensors")
    with pytest.raises(UserError, match=message):
        export(checkpoint, out, **options)
    assert os.listdir(tmp_path) == []


_MEASURE = """
import sys
from contextlib import suppress
from anonymous import Peak
from distrain.checkpoints.export import copying, export
with Peak() as peak:
    export(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None)
print(peak.most)
if not sys.argv[3]:
    assert not sys.modules.keys() & {"numpy", "pydantic", "yaml", "torch", "typer", "tempfile"}
"""


@pytest.mark.parametrize("dtype", ["", "bf16"])
def test_memory_is_bounded(tmp_path, dtype):
    numel = 48 << 20  # 192 MiB
    specs = {"model/w": TensorSpec((numel,), "F32", "parameter")}
    ranks = [[Piece("model/w", r * (numel // 2), np.zeros(2 * numel, np.uint8), copied=True)] for r in range(2)]
    described = DESCRIBED | {"aliases": {}}
    path = ThreadWorld(2).run(lambda comm: Saver(tmp_path, comm).save(1, specs, ranks[comm.rank], **described))[0].path
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), str(tmp_path / "out.safetensors"), dtype],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": IMPORTABLE},
    )  # fmt: skip
    assert int(ran.stdout) < 48 << 20


def test_full_disk(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="the disk has 100 left; free some space"):
        export(checkpoint, tmp_path / "out")
    assert list(Path(tmp_path / "out").iterdir()) == []


def test_trust_is_refused_where_nothing_runs(checkpoint, tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="--trust changes nothing"):
        export(tmp_path / "a.safetensors", tmp_path / "out.safetensors", trust=True)
    with pytest.raises(UserError, match="--trust is for other trainers"):
        export(checkpoint, tmp_path / "out.safetensors", trust=True)
