"""What a checkpoint costs does not grow faster than the world, and what a rank does hardly at all. Counts, no times."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import xxhash
from checkpoint_state import DESCRIBED, ThreadWorld, make_state, rewrite_manifest

from distrain.checkpoint import CheckpointError, Piece, Reader, Saver, TensorSpec, verify
from distrain.checkpoints import format as checkpoint_format
from distrain.checkpoints.export import export
from distrain.checkpoints.format import MANIFEST, RUNS_VERSION, Tensor, parse_manifest

ROWS = 200


def specs(tensors: int) -> dict[str, TensorSpec]:
    """Return a model's tensors: matrices, and a vector that is shorter than some worlds."""
    found = {f"model/m{n}": TensorSpec((ROWS, 3), "F32", "parameter") for n in range(tensors)}
    return found | {"model/short": TensorSpec((5,), "F32", "parameter"), "model/step": TensorSpec((), "I64", "buffer")}


def rows(state: dict[str, np.ndarray], known: dict[str, TensorSpec], rank: int, world_size: int) -> list[Piece]:
    """Return what a rank of FSDP2 holds: of each tensor the same number of rows, the last ranks fewer or none."""
    pieces = []
    for name, spec in known.items():
        length = spec.shape[0] if spec.shape else 1
        share = -(-length // world_size)
        start, stop = (min(length, share * r) for r in (rank, rank + 1))
        row = len(state[name]) // length
        elements = spec.numel // length
        pieces.append(Piece(name, start * elements, state[name][start * row : stop * row], copied=True))
    return pieces


def saved(folder: Path, world_size: int, tensors: int = 6) -> tuple[Path, dict[str, np.ndarray]]:
    known = specs(tensors)
    state = make_state(world_size, known)

    def save(comm: Any) -> Any:
        saver = Saver(folder, comm, asynchronous=False)
        return saver.save(1, known, rows(state, known, comm.rank, world_size), **DESCRIBED | {"aliases": {}})

    results = ThreadWorld(world_size).run(save)
    assert not [each for each in results if isinstance(each, Exception)], results
    return results[0].path, state


def assert_exported(path: Path, out: Path, state: dict[str, np.ndarray]) -> None:
    exported = safetensors.torch.load_file(export(path, out).paths[0])
    assert all(tensor.numpy().tobytes() == state[f"model/{name}"].tobytes() for name, tensor in exported.items())


@pytest.mark.parametrize("world_size", [3, 7, 8, 25, 64])
def test_pieces_in_runs_are_those_that_ranks_wrote(tmp_path, world_size):
    path, state = saved(tmp_path, world_size)
    assert verify(path) == []
    rng = np.random.default_rng(world_size)
    with Reader(path) as reader:
        for name, tensor in reader.manifest.tensors.items():
            pieces = [
                (rank, piece.start, len(piece.data) * tensor.spec.numel // len(state[name]))
                for rank in range(world_size)
                for piece in rows(state, {name: tensor.spec}, rank, world_size)
                if len(piece.data)
            ]
            assert tensor.pieces == tuple(pieces)
            size = len(state[name]) // tensor.spec.numel
            for _ in range(5):
                start, stop = sorted(rng.integers(0, tensor.spec.numel + 1, 2))
                read = reader.read(name, int(start), int(stop - start))
                assert read.tobytes() == state[name][start * size : stop * size].tobytes()
    assert_exported(path, tmp_path / "out", state)


def test_small_worlds_write_what_earlier_versions_read(tmp_path):
    version = {}
    for world_size in (4, 25):
        content = json.loads((saved(tmp_path / str(world_size), world_size)[0] / MANIFEST).read_bytes())
        lengths = {len(piece) for tensor in content["tensors"].values() for piece in tensor["pieces"]}
        assert lengths == ({3} if world_size == 4 else {3, 4})
        version[world_size] = content["version"]
    assert version == {4: 1, 25: RUNS_VERSION}


def test_a_manifest_lists_no_more_for_more_ranks(tmp_path):
    listed = {}
    for world_size in (16, 64):
        content = json.loads((saved(tmp_path / str(world_size), world_size)[0] / MANIFEST).read_bytes())
        listed[world_size] = len(json.dumps(content["tensors"]))
    assert listed[64] < 1.2 * listed[16]


def test_a_manifest_of_many_pieces_in_any_order_is_read_in_as_many_looks(monkeypatch):
    looked = [0]

    class Counted(tuple):  # type: ignore[type-arg]
        __slots__ = ()

        def __getitem__(self, index: Any) -> Any:
            looked[0] += 1
            return super().__getitem__(index)

    count = 4096
    order = np.random.default_rng(0).permutation(count)
    tensor = Tensor(TensorSpec((count,), "F32", "parameter"), Counted((int(f), n, 1, 1) for n, f in enumerate(order)))
    assert [next(tensor.pieces_from(n)) for n in range(0, count, 64)] == [
        (int(order[n]), n, 1) for n in range(0, count, 64)
    ]
    assert looked[0] <= 64 * 20


@pytest.mark.parametrize("world_size", [16, 64])
def test_a_rank_of_another_world_opens_the_few_files_that_it_needs(tmp_path, monkeypatch, world_size):
    path, _ = saved(tmp_path, world_size)
    with Reader(path, verify=False) as reader:
        opened = []
        open_ = os.open
        monkeypatch.setattr(os, "open", lambda name, *more, **kw: opened.append(str(name)) or open_(name, *more, **kw))
        others = world_size * 3 // 4
        for name, tensor in reader.manifest.tensors.items():
            if len(tensor.runs) and tensor.spec.shape == (ROWS, 3):
                share = -(-ROWS // others)
                reader.read(name, 3 * share * 2, 3 * share)  # what rank 2 of three quarters as many holds
    assert len({name for name in opened if "rank-" in name}) <= 3


def test_an_export_makes_calls_for_each_file_and_none_for_each_piece(tmp_path, monkeypatch):
    calls: list[str] = []
    for call in ("open", "pread", "preadv", "pwrite", "pwritev"):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *a, call=call, real=real, **kw: calls.append(call) or real(*a, **kw))
    counts = {}
    for world_size in (16, 64):
        path, _ = saved(tmp_path / str(world_size), world_size, tensors=40)
        for verified in (True, False):
            calls.clear()
            export(path, tmp_path / f"{world_size}-{verified}.safetensors", verify=verified)
            writes = calls.count("pwrite") + calls.count("pwritev")
            counts[world_size, verified] = len(calls) - writes, writes
    for verified in (True, False):
        (reads, writes), (more_reads, more_writes) = counts[16, verified], counts[64, verified]
        assert more_reads - reads <= (64 - 16) * 8  # and there are 40 pieces in each file
        assert more_writes - writes <= 64 * 40 // 512


def test_headers_of_files_are_not_parsed_where_they_are_as_they_must_be(tmp_path, monkeypatch):
    path, state = saved(tmp_path, 25)
    parsed: list[Any] = []
    decode = json.JSONDecoder.decode
    monkeypatch.setattr(json.JSONDecoder, "decode", lambda *a, **kw: parsed.append(a) or decode(*a, **kw))
    assert verify(path) == []
    assert len(parsed) == 1  # the manifest
    assert_exported(path, tmp_path / "one", state)


def with_header(path: Path, rank: int, change: Any) -> None:
    """Write another header to a rank's file, and the hash of what it is then to the manifest."""
    file = sorted(path.glob("rank-*"))[rank]
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text = json.dumps(change(json.loads(whole[8 : 8 + length]))).encode()
    raw = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    file.write_bytes(raw)
    listed = {"name": file.name, "size": len(raw), "xxh3_128": xxhash.xxh3_128_hexdigest(raw)}
    rewrite_manifest(path, lambda content: content["files"].__setitem__(rank, listed))


def test_a_header_of_another_form_is_read_and_one_of_other_pieces_refused(tmp_path):
    path, state = saved(tmp_path, 25)
    with_header(path, 3, lambda header: dict(reversed(header.items())))
    assert verify(path) == []
    assert_exported(path, tmp_path / "one", state)
    with_header(path, 4, lambda header: {key.replace("m3@", "m3@1"): each for key, each in header.items()})
    (problem,) = verify(path)
    assert "rank-00004-of-00025" in problem
    assert "its header lists other pieces than the manifest" in problem
    for verified in (True, False):
        with pytest.raises(CheckpointError, match="its header lists other pieces than the manifest"):
            export(path, tmp_path / "two", verify=verified)
    assert not (tmp_path / "two").exists()


def test_a_thousand_ranks_of_ten_thousand_tensors_fit_a_manifest():
    tensors = {
        f"model/layer.{n}.weight": {
            "shape": [2048, 8], "dtype": "F32", "role": "parameter", "pieces": [[0, 0, 16, 1024]],
        }
        for n in range(10_000)
    }  # fmt: skip
    known = {name: TensorSpec((2048, 8), "F32", "parameter") for name in tensors}
    content = {
        "format": "distrain", "version": RUNS_VERSION, "step": 1, "created": "", "world_size": 1024,
        "strategy": "fsdp2", "score": None, "fingerprint": checkpoint_format.fingerprint(known), "recipe": "",
        "scalars": {}, "aliases": {}, "files": [
            {"name": checkpoint_format.rank_file_name(rank, 1024), "size": 640_000, "xxh3_128": "0" * 32}
            for rank in range(1024)
        ],
        "tensors": tensors,
    }  # fmt: skip
    text = checkpoint_format.canonical_json(content)
    raw = b'{"xxh3_128":"%s",' % checkpoint_format.xxhash.xxh3_128_hexdigest(text).encode() + text[1:]
    assert len(raw) < 2 << 20
    manifest = parse_manifest(raw)
    assert sum(len(tensor.runs) for tensor in manifest.tensors.values()) == 10_000
    assert len(manifest.tensors["model/layer.7.weight"].pieces) == 1024
