"""Checkpoints: complete or absent, and every damage found and named."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
import xxhash
from checkpoint_state import DESCRIBED, SPECS, ThreadWorld, cut, make_state, rewrite_manifest, run_processes, save_world
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.checkpoint import (
    CheckpointError,
    Criterion,
    Evaluation,
    LocalCommunicator,
    Piece,
    Reader,
    Saver,
    TensorSpec,
    difference,
    explain_difference,
    find_best,
    find_newest,
    fingerprint,
    list_checkpoints,
    newest_step,
    read_manifest,
    verify,
)
from distrain.checkpoints import hiding, writing
from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.floats import convert
from distrain.checkpoints.format import MANIFEST


def local(folder: Path, **options: Any) -> Saver:
    return Saver(folder, LocalCommunicator(), **options)


def save(folder: Path, step: int, seed: int = 0, score: float | None = None, **options: Any) -> Path:
    state = make_state(seed)
    return local(folder, **options).save(step, SPECS, cut(state, 1)[0], score=score, **DESCRIBED).path


def assert_holds(path: Path, state: dict[str, np.ndarray]) -> None:
    with Reader(path) as reader:
        assert reader.manifest.specs == SPECS
        for name, raw in state.items():
            assert np.array_equal(reader.read(name, 0, SPECS[name].numel), raw), name


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --------------------------------------------------------------------------------------------------------------------
# Round trips


@settings(max_examples=60)
@given(world_size=st.integers(1, 3), seed=st.integers(0, 10**6), asynchronous=st.booleans(), data=st.data())
def test_any_range_comes_back_whatever_the_cuts(tmp_path_factory, world_size, seed, asynchronous, data):
    folder = tmp_path_factory.mktemp("round")
    state = make_state(seed)
    saved = save_world(folder, world_size, 5, state, seed=seed, asynchronous=asynchronous)
    assert len({str(item) for item in saved}) == 1
    assert verify(saved[0].path) == []
    assert_holds(saved[0].path, state)
    with Reader(saved[0].path, verify=False) as reader:
        for name, spec in SPECS.items():
            start = data.draw(st.integers(0, spec.numel))
            stop = data.draw(st.integers(start, spec.numel))
            size = ITEM_SIZES[spec.dtype]
            buffer = bytearray((stop - start) * size)
            reader.read(name, start, stop - start, buffer)
            assert buffer == state[name].tobytes()[start * size : stop * size]
    shutil.rmtree(folder)


def test_manifest_reports_what_was_saved(tmp_path):
    manifest = read_manifest(save(tmp_path, 12, score=0.5))
    assert (manifest.step, manifest.world_size, manifest.strategy, manifest.score) == (12, 1, "ddp", 0.5)
    assert manifest.scalars == DESCRIBED["scalars"]
    assert manifest.recipe == DESCRIBED["recipe"]
    assert manifest.fingerprint == fingerprint(SPECS)
    with Reader(tmp_path / "step-00000012") as reader:
        assert np.array_equal(reader.read("model/tied.weight", 3, 9), reader.read("model/layer.weight", 3, 9))
        with pytest.raises(CheckpointError, match=r"no tensor 'model/layer.wieght'; did you mean 'model/layer.weight'"):
            reader.read("model/layer.wieght", 0, 1)


def test_rank_files_are_safetensors(tmp_path):
    state = make_state(1)
    path = save_world(tmp_path, 2, 1, state)[0].path
    manifest = read_manifest(path)
    files = [safetensors.safe_open(path / info.name, "np") for info in manifest.files]
    for name, tensor in manifest.tensors.items():
        if tensor.spec.dtype != "BF16":
            raw = b"".join(files[file].get_tensor(f"{name}@{start}").tobytes() for file, start, _ in tensor.pieces)
            assert raw == state[name].tobytes()


def test_asynchronous_files_equal_synchronous_ones(tmp_path):
    one, other = (save(tmp_path / str(flag), 3, asynchronous=flag) for flag in (True, False))
    for name in names(one):
        if name != MANIFEST:
            assert (one / name).read_bytes() == (other / name).read_bytes()
    assert difference(one, other).identical


def test_asynchronous_save_is_a_copy_of_the_moment(tmp_path):
    state = make_state(0)
    expected = {name: raw.copy() for name, raw in state.items()}
    saver = local(tmp_path)
    for step in (1, 2):  # the second time the buffer is used again
        assert saver.begin(step, SPECS, [Piece(name, 0, raw) for name, raw in state.items()], **DESCRIBED) is None
        for raw in state.values():
            raw ^= 255
        assert saver.in_flight == step
        saved = saver.finish()
        assert saver.written
        assert saver.in_flight is None
        assert_holds(saved.path, expected)
        expected = {name: raw.copy() for name, raw in state.items()}
    assert saver.finish() is None


def test_begin_finishes_the_save_before(tmp_path):
    saver = local(tmp_path)
    pieces = cut(make_state(0), 1)[0]
    assert saver.begin(1, SPECS, pieces, **DESCRIBED) is None
    before = saver.begin(2, SPECS, iter(()), **DESCRIBED)
    assert before is not None
    assert before.path.is_dir()
    with pytest.raises(CheckpointError, match="elements, and its pieces hold 0"):
        saver.finish()
    assert names(tmp_path) == ["step-00000001"]


def test_processes_save_together(tmp_path):
    def body(comm):
        saver = Saver(tmp_path / "checkpoints", comm)
        saver.dry_run()
        for step in (10, 20):
            saver.begin(step, SPECS, cut(make_state(step), 2)[comm.rank], **DESCRIBED)
            while not saver.written:
                time.sleep(0.001)
        assert saver.finish().step == 20

    assert run_processes(2, tmp_path / "speech", body) == [0, 0]
    for step in (10, 20):
        assert_holds(tmp_path / "checkpoints" / f"step-{step:08d}", make_state(step))


def test_headers_are_read_where_they_are_not_those_of_the_save_before(tmp_path, monkeypatch):
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *call: read.append(call) or pread(*call))

    def body(comm):
        counts = []
        saver = Saver(tmp_path / "checkpoints", comm, keep=9, asynchronous=False)
        for step, other in ((10, False), (20, False), (30, True), (40, True)):
            before = len(read)
            state = make_state(step)
            pieces = cut(state, 2)[comm.rank] if not other else cut(state, 2)[1 - comm.rank]
            saver.save(step, SPECS, pieces, **DESCRIBED)
            counts.append(len(read) - before)
        return counts

    counts, _ = ThreadWorld(2).run(body)
    assert [count > 0 for count in counts] == [True, False, True, False]
    for step in (10, 20, 30, 40):
        assert_holds(tmp_path / "checkpoints" / f"step-{step:08d}", make_state(step))
    pieces = [read_manifest(tmp_path / "checkpoints" / f"step-{step:08d}").tensors for step in (10, 20, 30, 40)]
    assert pieces[0] == pieces[1] != pieces[2] == pieces[3]


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_file_that_rank_0_does_not_see_whole_is_not_published(tmp_path, change):
    saver = local(tmp_path, asynchronous=False)
    for step in (1, 2):
        saver.begin(step, SPECS, cut(make_state(step), 1)[0], **DESCRIBED)
        if step == 1:
            saver.finish()
    (file,) = tmp_path.glob(".tmp-step-00000002*/rank-*")
    if change == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        saver.finish()
    assert names(tmp_path) == ["step-00000001"]


def no_renameat2(*_args, **_options):
    """Stand in for the C library of a system that cannot swap two names."""
    return SimpleNamespace()


def test_same_step_again_replaces_it(tmp_path, monkeypatch):
    for swap in (True, False):
        if not swap:
            monkeypatch.setattr(ctypes, "CDLL", no_renameat2)
        save(tmp_path, 4, seed=1)
        path = save(tmp_path, 4, seed=2)
        assert_holds(path, make_state(2))
        assert names(tmp_path) == ["step-00000004"]


def test_same_step_again_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = save(tmp_path, 4, seed=1)
    rename = os.rename

    def fail(source, target):
        if Path(source).name.startswith(".tmp"):
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(ctypes, "CDLL", no_renameat2)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 4, seed=2)
    assert_intact(tmp_path, make_state(1), step=4)
    assert path.is_dir()


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    path = save(tmp_path, 1)
    verify(path)
    find_newest(tmp_path)
    with Reader(path) as reader:
        reader.read("model/wide", 0, 3)
    (path / "extra").write_text("x")
    with pytest.raises(CheckpointError):
        Reader(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reader_opens_few_files_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Reader, "_MAX_OPEN", 1)
    state = make_state(3)
    assert_holds(save_world(tmp_path, 3, 1, state)[0].path, state)


def test_imports_no_torch():
    code = "import sys, distrain.checkpoint, distrain.checkpoints.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"a": (1, 2)}, r"scalars\.a is \(1, 2\), a tuple"),
        ({"a": [{1: 2}]}, r"scalars\.a\[0\] has the key 1"),
        ({"a": float("nan")}, r"scalars\.a is nan"),
        ({"a": np.float32(1)}, "float32"),
    ],
)
def test_scalars_that_json_would_change_are_refused(tmp_path, scalars, message):
    with pytest.raises(CheckpointError, match=message):
        local(tmp_path).save(1, SPECS, cut(make_state(0), 1)[0], **(DESCRIBED | {"scalars": scalars}))
    assert names(tmp_path) == []


# --------------------------------------------------------------------------------------------------------------------
# Retention


def test_newest_and_best_are_kept(tmp_path):
    for step, score in enumerate([0.1, 0.9, 0.3, None, float("nan"), 0.9, 0.2], start=1):
        save(tmp_path, step, score=score, keep=2, keep_best=1)
    assert [info.step for info in list_checkpoints(tmp_path)] == [7, 6, 2]
    assert find_best(tmp_path) == tmp_path / "step-00000002"
    saver = local(tmp_path, keep=1, keep_best=0)
    saved = saver.save(8, SPECS, cut(make_state(0), 1)[0], **DESCRIBED)
    assert saved.retired == ("step-00000007", "step-00000006", "step-00000002")
    assert find_best(tmp_path) is None


def test_later_steps_stay_and_do_not_count(tmp_path):
    for step in (10, 20, 90):
        save(tmp_path, step)
    save(tmp_path, 30, keep=2, keep_best=0)
    assert [info.step for info in list_checkpoints(tmp_path)] == [90, 30, 20]


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    host = hiding.HOST
    dead = tmp_path / f".tmp-step-00000001-{host}-{child.pid}-5-ab"
    trash = tmp_path / f".trash-step-00000001-{host}-{child.pid}-5-ab"
    elsewhere = tmp_path / ".tmp-step-00000001-other.node-1-5-ab"
    old = tmp_path / ".tmp-step-00000002-other.node-1-5-ab"
    parent = os.getppid()
    alive = tmp_path / f".tmp-step-00000003-{host}-{parent}-{hiding._started(parent)}-ab"
    strange = tmp_path / ".tmp-mine"
    for folder in (dead, trash, elsewhere, old, alive, strange):
        folder.mkdir()
        (folder / "file").write_text("x")
    os.utime(old / "file", (0, time.time() - 2 * 86400))
    os.utime(old, (0, time.time() - 2 * 86400))
    save(tmp_path, 1)
    assert names(tmp_path) == sorted([elsewhere.name, alive.name, strange.name, "step-00000001"])


def test_what_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(path, **_):
        raise PermissionError(1, "not yours", str(path))

    monkeypatch.setattr(writing.shutil, "rmtree", refuse)
    saved = local(tmp_path, keep=1).save(2, SPECS, cut(make_state(0), 1)[0], **DESCRIBED)
    assert saved.retired == ("step-00000001",)
    assert "could not be removed" in saved.warnings[0]


# --------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save_world(folder, 2, 100, make_state(1))
    return save_world(folder, 2, 200, make_state(2))[0].path


@pytest.fixture
def damaged(sound, tmp_path):
    """A folder of two checkpoints, whose newer one is for damaging."""
    shutil.copytree(sound.parent, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / sound.name


def assert_refused(path: Path, *parts: str) -> str:
    """The damage is named, opening raises, and the one before is chosen."""
    problems = "\n".join(verify(path))
    for part in parts:
        assert part in problems
    with pytest.raises(CheckpointError):
        Reader(path)
    newest, skipped = find_newest(path.parent)
    assert newest == path.parent / "step-00000100"
    assert [item[0] for item in skipped] == [path]
    assert skipped[0][1]
    return problems


@pytest.mark.fault(14)
def test_every_flipped_bit_is_found(damaged):
    for name in names(damaged):
        file = damaged / name
        sound = file.read_bytes()
        offsets = sorted({*range(0, len(sound), max(1, len(sound) // 61)), *range(24), len(sound) - 1})
        for offset in offsets:
            for bit in (0, 5):
                file.write_bytes(sound[:offset] + bytes([sound[offset] ^ 1 << bit]) + sound[offset + 1 :])
                problems = verify(damaged)
                assert problems, f"{name}, byte {offset}, bit {bit}"
                assert name in problems[0]
        assert_refused(damaged, name)
        file.write_bytes(sound)
    assert verify(damaged) == []


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("left", [0, 7, 20, -1])
@pytest.mark.fault(15)
def test_truncated_file(damaged, index, left):
    file = damaged / names(damaged)[index]
    file.write_bytes(file.read_bytes()[:left])
    assert_refused(damaged, file.name)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.fault(15)
def test_missing_file(damaged, index):
    name = names(damaged)[index]
    (damaged / name).unlink()
    assert_refused(damaged, f"{name}: it is not there")


@pytest.mark.fault(15)
def test_extra_file(damaged):
    (damaged / "rank-00002-of-00002.safetensors").write_bytes(b"x")
    assert_refused(damaged, "rank-00002-of-00002.safetensors: it is not part of this checkpoint")


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.fault(27)
def test_symbolic_links_and_other_things_are_refused(damaged, index, tmp_path):
    file = damaged / names(damaged)[index]
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert_refused(damaged, f"{file.name}: it is a symbolic link")
    file.unlink()
    os.mkfifo(file)
    assert_refused(damaged, f"{file.name}: it is not a regular file")
    file.unlink()
    file.mkdir()
    assert_refused(damaged, f"{file.name}: it is not a regular file")


@pytest.mark.fault(27)
def test_a_linked_checkpoint_is_never_picked(damaged):
    (damaged.parent / "step-00000300").symlink_to(damaged)
    assert find_newest(damaged.parent) == (damaged, [])


def set_value(*keys: Any) -> Any:
    def change(content: Any) -> None:
        for key in keys[:-2]:
            content = content[key]
        content[keys[-2]] = keys[-1]

    return change


def frozen_one(name: str, shape: list[int]) -> dict[str, Any]:
    """Return what a manifest says of one tensor that it refers to."""
    return {"key": "seed", "path": None, "tensors": {name: {"shape": shape, "dtype": "F32", "xxh3_128": "0" * 32}}}


def drop(key: str) -> Any:
    return lambda content: content.pop(key)


@pytest.mark.parametrize(
    "change",
    [
        set_value("files", 0, "name", "../rank-00000-of-00002.safetensors"),
        set_value("files", 0, "name", "/etc/passwd"),
        set_value("files", 0, "name", "rank-00001-of-00002.safetensors"),
        set_value("files", 0, "size", 10**15),
        set_value("files", 0, "size", -5),
        set_value("files", 0, "size", True),
        set_value("files", 0, "extra", 1),
        set_value("files", 0, []),
        set_value("world_size", 1),
        set_value("world_size", 10**9),
        set_value("version", 4),
        set_value("frozen", []),
        set_value("frozen", {"key": "seed", "path": None}),
        set_value("frozen", frozen_one("w", [2])),
        set_value("frozen", frozen_one("model/w", [-2])),
        lambda content: content.update(frozen=frozen_one(min(content["tensors"]), [2])),
        set_value("format", "other"),
        set_value("step", "200"),
        set_value("step", -1),
        set_value("step", 1e30),
        set_value("step", 10**18),
        set_value("step", 100),
        set_value("step", True),
        set_value("score", "high"),
        set_value("unknown", 1),
        set_value("aliases", {"model/x": "model/y"}),
        set_value("aliases", {"model/half": "model/wide"}),
        set_value("aliases", {"model/x": 3}),
        set_value("fingerprint", "0" * 32),
        set_value("tensors", "model/wide", "shape", [2**40, 2**40]),
        set_value("tensors", "model/wide", "shape", [10]),
        set_value("tensors", "model/wide", "shape", [-9]),
        set_value("tensors", "model/wide", "shape", [9.0]),
        set_value("tensors", "model/wide", "dtype", "F32"),
        set_value("tensors", "model/wide", "dtype", "O"),
        set_value("tensors", "model/wide", "role", "other"),
        set_value("tensors", "model/wide", "role", "optimizer"),
        set_value("tensors", "model/layer.weight", "role", "buffer"),
        set_value("tensors", "ema/layer.weight", "role", "parameter"),
        set_value("tensors", "model/wide", "pieces", [[0, 0, 5], [0, 4, 5]]),
        set_value("tensors", "model/wide", "pieces", [[0, 0, 5], [0, 6, 3]]),
        set_value("tensors", "model/wide", "pieces", [[0, 0, 9]]),
        set_value("tensors", "model/wide", "pieces", [[7, 0, 9]]),
        set_value("tensors", "model/wide", "pieces", [[-1, 0, 9]]),
        set_value("tensors", "model/wide", "pieces", [[0, 0, -9]]),
        set_value("tensors", "model/wide", "pieces", [[0, 0]]),
        set_value("tensors", "model/wide", "pieces", [[1, 0, 3, 3]]),
        set_value("tensors", "model/wide", "pieces", [[0, 0, 3, 2]]),
        set_value("tensors", "model/wide", "pieces", [[0, 0, 9, 0]]),
        set_value("tensors", "model/wide", "pieces", [[0, 0, -9, -1]]),
        set_value("tensors", "model/wide", "pieces", [[0, 0, 9, 1, 1]]),
        set_value("tensors", "model/wide", "pieces", [[0, False, 9]]),
        set_value("tensors", "model/wide", "pieces", []),
        set_value("tensors", "model/wide", None),
        set_value("tensors", []),
        set_value("files", {}),
        drop("recipe"),
        drop("files"),
        drop("scalars"),
    ],
)
@pytest.mark.fault(27)
def test_manifest_of_somebody_who_can_hash(damaged, change):
    rewrite_manifest(damaged, change)
    assert_refused(damaged)


@pytest.mark.parametrize(
    "text",
    [b"{}", b"[]", b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b'{"a":"\\ud800"}'],
)
def test_manifest_that_is_no_json(damaged, text):
    digest = xxhash.xxh3_128_hexdigest(b"{" + text[1:]).encode()
    (damaged / MANIFEST).write_bytes(b'{"xxh3_128":"%s",' % digest + text[1:])
    assert_refused(damaged, MANIFEST)
    (damaged / MANIFEST).write_bytes(text)
    assert_refused(damaged, MANIFEST)


@pytest.mark.parametrize("number", [b"1e999", b"-1E+999", b"Infinity", b"1" * 400, b"1" * 400 + b".0"])
@pytest.mark.parametrize("place", [b'"score":', b'"scalars":{', b'"step":', b'"size":'])
def test_a_manifest_with_a_number_that_is_none(damaged, number, place):
    body = (damaged / MANIFEST).read_bytes()[len('{"xxh3_128":"",') + 32 :]
    begin = body.index(place) + len(place)
    if place.endswith(b"{"):
        changed = body[:begin] + b'"z":' + number + b"," + body[begin:]
    else:
        end = begin + len(re.match(rb"[^,}]*", body[begin:])[0])
        changed = body[:begin] + number + body[end:]
    digest = xxhash.xxh3_128_hexdigest(b"{" + changed).encode()
    (damaged / MANIFEST).write_bytes(b'{"xxh3_128":"%s",' % digest + changed)
    assert "number" in assert_refused(damaged, MANIFEST)


@pytest.mark.parametrize("name", ["step-00000300", "step-00000001", "step-000000000000000200"])
def test_a_folder_with_another_steps_name_is_refused(damaged, name):
    copy = damaged.parent / name
    shutil.copytree(damaged, copy)
    if int(name[5:]) == 200:
        assert verify(copy) == []
        return
    (problem,) = verify(copy)
    assert f"it is of step 200, and its folder has the name of step {int(name[5:])}" in problem
    with pytest.raises(CheckpointError, match="copied or renamed"):
        read_manifest(copy)
    for whole in (True, False):
        newest, skipped = find_newest(damaged.parent, verify=whole)
        assert newest == damaged
        assert [path for path, _ in skipped] == ([copy] if name == "step-00000300" else [])
    assert newest_step(damaged.parent) == 200
    copy.rename(damaged.parent / "kept-by-hand")
    assert verify(damaged.parent / "kept-by-hand") == []


def test_a_manifest_that_is_too_large_is_refused_and_not_written(damaged, monkeypatch):
    os.truncate(damaged / MANIFEST, 8 << 30)
    assert_refused(damaged, f"{MANIFEST}: it has 8,589,934,592 bytes")
    monkeypatch.setattr(writing, "MAX_MANIFEST", 1000)
    with pytest.raises(CheckpointError, match=r"step 300 was not saved.*\n.*MANIFEST.json would have .* bytes"):
        save(damaged.parent, 300)
    assert find_newest(damaged.parent)[0].name == "step-00000100"


def replace_rank_file(path: Path, content: bytes) -> None:
    file = path / "rank-00000-of-00002.safetensors"
    file.write_bytes(content)

    def change(manifest: Any) -> None:
        manifest["files"][0] |= {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}

    rewrite_manifest(path, change)


def test_rank_file_header_that_lies(damaged):
    sound = (damaged / "rank-00000-of-00002.safetensors").read_bytes()
    length = int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8 : 8 + length])
    first, second = list(header)[:2]

    def packed(changed: Any) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + sound[8 + length :]

    lies = [
        (2**63).to_bytes(8, "little") + sound[8:],
        (len(sound)).to_bytes(8, "little") + sound[8:],
        (10**8 + 1).to_bytes(8, "little") + sound[8:],
        packed(b"[]"),
        packed(b'{"a":{},"a":{}}'),
        packed(header | {first: header[second]}),
        packed(header | {first: header[first] | {"dtype": "I8"}}),
        packed(header | {first: header[first] | {"shape": [2**62]}}),
        packed(header | {first: header[first] | {"data_offsets": [0, 10**12]}}),
        packed(header | {first: header[first] | {"data_offsets": [-8, 0]}}),
        packed(header | {first: 3}),
        packed({("x" if key == first else key): value for key, value in header.items()}),
        packed(header) + b"more",
    ]
    for lie in lies:
        replace_rank_file(damaged, lie)
        assert_refused(damaged, "rank-00000-of-00002.safetensors")
    replace_rank_file(damaged, sound)
    assert verify(damaged) == []


@pytest.mark.fault(26)
def test_a_pickle_is_refused_and_does_not_run(damaged, tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    replace_rank_file(damaged, pickle.dumps(Evil()) + bytes(1000))
    assert_refused(damaged, "not a safetensors file")
    (damaged / MANIFEST).write_bytes(pickle.dumps(Evil()))
    assert_refused(damaged, MANIFEST)
    assert not canary.exists()


def test_nothing_and_no_folder(tmp_path):
    assert find_newest(tmp_path / "none") == (None, [])
    assert verify(tmp_path / "none") == [f"{tmp_path / 'none'} does not exist"]
    (tmp_path / "file").write_text("")
    assert verify(tmp_path / "file") == [f"{tmp_path / 'file'} is not a folder"]
    with pytest.raises(CheckpointError):
        list_checkpoints(tmp_path / "file")


# --------------------------------------------------------------------------------------------------------------------
# Faults while saving


def assert_intact(folder: Path, state: dict[str, np.ndarray], step: int = 1) -> None:
    assert names(folder) == [f"step-{step:08d}"]
    assert_holds(folder / f"step-{step:08d}", state)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("broken", [0, 2])
def test_fault_of_one_rank_is_raised_by_all(tmp_path, monkeypatch, asynchronous, broken):
    state = make_state(1)
    save_world(tmp_path, 3, 1, state)
    sync = os.fsync

    def fail(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if f"rank-{broken:05d}-" in Path(path).name:
            raise OSError(28, "No space left on device", path)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    errors = save_world(tmp_path, 3, 2, make_state(2), asynchronous=asynchronous)
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert isinstance(error, CheckpointError)
        for part in (
            "step 2 was not saved",
            f"rank {broken} on {hiding.HOST}",
            f"rank-{broken:05d}-of",
            "disk is full",
        ):
            assert part in str(error)
    assert_intact(tmp_path, state)


def test_fault_in_the_pieces_of_one_rank(tmp_path):
    ranks = cut(make_state(1), 2)

    def broken(comm):
        def pieces():
            yield from ranks[comm.rank]
            if comm.rank == 1:
                raise RuntimeError("the device is gone")

        return Saver(tmp_path, comm).save(1, SPECS, pieces(), **DESCRIBED)

    for error in ThreadWorld(2).run(broken):
        assert "rank 1 on" in str(error)
        assert "RuntimeError: the device is gone" in str(error)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("change", "message"), [("twice", "more than once"), ("none", "not at all|pieces hold")])
def test_pieces_that_do_not_tile_are_not_published(tmp_path, change, message):
    ranks = [[Piece(name, 0, raw) for name, raw in make_state(1).items()], []]
    if change == "twice":
        ranks[1].append(ranks[0][0])
    else:
        del ranks[0][0]
    errors = ThreadWorld(2).run(lambda comm: Saver(tmp_path, comm).save(1, SPECS, ranks[comm.rank], **DESCRIBED))
    for error in errors:
        with pytest.raises(CheckpointError, match=message):
            raise error
    assert names(tmp_path) == []


@pytest.mark.fault(18)
def test_ranks_that_see_different_folders(tmp_path):
    def body(comm):
        saver = Saver(tmp_path / str(comm.rank), comm)
        try:
            saver.dry_run()
        except CheckpointError as error:
            return str(error)

    for text in ThreadWorld(2).run(body):
        assert "rank 1 on" in text
        assert "all ranks must see the same run folder" in text
    assert names(tmp_path / "0") == []


def test_fence_stops_the_publishing(tmp_path):
    def fence():
        raise RuntimeError("job 7.1 has taken over")

    with pytest.raises(CheckpointError, match=r"job 7\.1 has taken over"):
        local(tmp_path, fence=fence).save(1, SPECS, cut(make_state(0), 1)[0], **DESCRIBED)
    assert names(tmp_path) == []


def test_close_gives_up(tmp_path):
    saver = local(tmp_path)
    saver.begin(1, SPECS, cut(make_state(0), 1)[0], **DESCRIBED)
    saver.close()
    saver.close()
    assert names(tmp_path) == []
    assert saver.finish() is None


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.fault(12)
def test_file_size_limit(tmp_path, asynchronous):
    state = make_state(1)
    save(tmp_path, 1, seed=1)
    specs = {"model/large": TensorSpec((8 << 20,), "U8", "parameter")}
    large = np.zeros(8 << 20, np.uint8)

    def body(comm):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        saver = Saver(tmp_path, comm, asynchronous=asynchronous)
        with pytest.raises(CheckpointError, match=r"rank 0 on .*file-size limit"):
            saver.save(2, specs, [Piece("model/large", 0, large)], **(DESCRIBED | {"aliases": {}}))

    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    assert run_processes(1, tmp_path.parent / f"speech-{asynchronous}", body) == [0]
    assert_intact(tmp_path, state)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.fault(12)
def test_full_disk(small_disk, asynchronous):
    state = make_state(1)
    save(small_disk, 1, seed=1)
    specs = {"model/large": TensorSpec((8 << 20,), "U8", "parameter")}
    large = [Piece("model/large", 0, np.zeros(8 << 20, np.uint8))]
    saver = local(small_disk, asynchronous=asynchronous)
    with pytest.raises(CheckpointError, match="the disk is full; free some space"):
        saver.save(2, specs, large, **(DESCRIBED | {"aliases": {}}))
    assert_intact(small_disk, state)
    assert saver.save(3, SPECS, cut(make_state(3), 1)[0], **DESCRIBED).step == 3  # the saver is as good as before


@pytest.mark.fault(13)
def test_read_only_disk(small_disk):
    state = make_state(1)
    save(small_disk, 1, seed=1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for call in (lambda: local(small_disk).dry_run(), lambda: save(small_disk, 2)):
        with pytest.raises(CheckpointError, match="read-only"):
            call()
    assert_intact(small_disk, state)


@pytest.mark.fault(13)
def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be written to"):
        local(tmp_path / "file" / "checkpoints").dry_run()


def test_the_dry_run_leaves_nothing_behind(tmp_path):
    ThreadWorld(3).run(lambda comm: Saver(tmp_path / "new", comm).dry_run())
    assert names(tmp_path / "new") == []


# --------------------------------------------------------------------------------------------------------------------
# Scores


def evaluated(metric: str, higher: bool, split: str = "test", data: str = "d", **values: float) -> Evaluation:
    return Evaluation(Criterion(metric, higher, split, data), values, {"loss": False, "accuracy": True})


def test_a_score_is_of_one_metric_direction_split_and_data(tmp_path):
    saver = local(tmp_path, keep=1, keep_best=1)
    saver.criterion = Criterion("loss", False, "test", "d")
    made = [
        evaluated("accuracy", True, accuracy=0.9, loss=0.5),  # of the metric before, and yet its loss is known
        evaluated("accuracy", True, accuracy=0.95),
        evaluated("loss", False, "valid", loss=0.1),
        evaluated("loss", False, data="other", loss=0.2),
        evaluated("loss", False, loss=0.7),
        evaluated("loss", False),  # not evaluated, or not a number
    ]
    for step, evaluation in enumerate(made, start=1):
        saver.save(step, SPECS, cut(make_state(0), 1)[0], **DESCRIBED, evaluation=evaluation)
        assert read_manifest(tmp_path / f"step-{step:08d}").evaluation == evaluation
    assert names(tmp_path) == ["step-00000001", "step-00000006"]
    assert find_best(tmp_path) == tmp_path / "step-00000001"
    by_accuracy = read_manifest(tmp_path / "step-00000001")
    assert by_accuracy.score == 0.9
    assert by_accuracy.score_by(saver.criterion) == -0.5
    assert by_accuracy.score_by(Criterion("accuracy", False, "test", "d")) == -0.9
    for other in (Criterion("f1", True, "test", "d"), Criterion("loss", False, "valid", "d"), Criterion("loss", False)):
        assert by_accuracy.score_by(other) is None


@pytest.mark.parametrize("best", ["accuracy", "-loss", "loss", None])
def test_a_bare_score_is_of_the_metric_that_its_recipe_names(tmp_path, best):
    described = DESCRIBED | {"recipe": f"name: x\neval: {{best: {best or 'null'}}}\n"}
    local(tmp_path).save(1, SPECS, cut(make_state(0), 1)[0], **described, score=0.3)
    manifest = read_manifest(tmp_path / "step-00000001")
    name = (best or "loss").removeprefix("-")
    assert manifest.metric == name
    assert manifest.score_by(Criterion(name, True, "test")) == 0.3
    assert manifest.score_by(Criterion("other", True)) is None


@pytest.mark.parametrize(
    "change",
    [
        set_value("evaluation", "metric", 3),
        set_value("evaluation", "higher", "yes"),
        set_value("evaluation", "split", 1),
        set_value("evaluation", "values", "loss", "low"),
        set_value("evaluation", "values", "accuracy", True),
        set_value("evaluation", "directions", "loss", 1),
        set_value("evaluation", "more", 1),
        set_value("evaluation", "higher", False),
        set_value("evaluation", "metric", "loss"),
        set_value("score", 0.91),
        set_value("score", None),
        set_value("evaluation", []),
        set_value("history", 3),
    ],
)
def test_a_metric_that_differs_from_its_evaluation_is_refused(tmp_path, change):
    local(tmp_path).save(
        1, SPECS, cut(make_state(0), 1)[0], **DESCRIBED, evaluation=evaluated("accuracy", True, accuracy=0.9, loss=0.5)
    )
    rewrite_manifest(tmp_path / "step-00000001", change)
    assert verify(tmp_path / "step-00000001")


# --------------------------------------------------------------------------------------------------------------------
# Differences


@pytest.mark.fault(16)
def test_another_model_is_explained(tmp_path):
    manifest = read_manifest(save(tmp_path, 1))
    specs = dict(SPECS)
    specs["model/layer.weight"] = TensorSpec((7, 12), "F32", "parameter")
    specs["model/new"] = specs.pop("model/wide")
    lines = explain_difference(manifest, specs)
    assert lines == [
        "only in the checkpoint: model/wide parameter F64 [9]",
        "only in this run: model/new parameter F64 [9]",
        "different: model/layer.weight: parameter F32 [7, 11] in the checkpoint, parameter F32 [7, 12] in this run",
    ]
    many = {f"model/{i}": TensorSpec((), "F32", "parameter") for i in range(25)}
    assert "only in this run: and 15 more, 25 in all" in explain_difference(manifest, SPECS | many)
    assert explain_difference(manifest, SPECS) == []


def test_difference_of_two_checkpoints(tmp_path):
    state = make_state(1)
    one = save_world(tmp_path / "one", 1, 5, state)[0].path
    same = save_world(tmp_path / "same", 3, 5, state, seed=9)[0].path
    found = difference(one, same)
    assert found.identical
    assert found.lines() == [
        "the state of training is identical, bit for bit",
        "note: world_size: 1 in the first, 3 in the second",
    ]
    state["model/half"].view("u2")[1] ^= 1  # one unit in the last place of a bfloat16
    state["model/layer.weight"].view("f4")[4] = np.nan
    state["model/count"][0] ^= 1
    other = save_world(tmp_path / "other", 2, 6, state)[0].path
    found = difference(one, other)
    assert not found.identical
    assert found.listing == ("step: 5 in the first, 6 in the second",)
    by_name = {item.name: item for item in found.tensors}
    assert sorted(by_name) == ["model/count", "model/half", "model/layer.weight"]
    assert by_name["model/count"].max_abs is None
    assert by_name["model/half"].differing == 1
    assert 2**-9 < by_name["model/half"].max_rel <= 2**-7
    assert np.isnan(by_name["model/layer.weight"].max_abs)


@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16"])
def test_conversions_equal_those_of_torch(source, target):
    import torch

    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if ITEM_SIZES[source] == 2:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # every one there is
        values = bits.view(types[source])
    else:
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator, dtype=torch.int64).to(torch.int32)
        near = torch.randn(1 << 18, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-9, 6, (1 << 18,))
        values = torch.cat(
            [bits.view(torch.float32).double(), near, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 65519.99, 65520.0])]
        )
        values = values.to(types[source])
    raw, overflowed = convert(values.view(torch.uint8).numpy(), source, target)
    ours, theirs = torch.from_numpy(raw.copy()).view(types[target]), values.to(types[target])
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    assert bool(same.all())
    assert overflowed == int((theirs.isinf() & ~values.isinf()).sum())
