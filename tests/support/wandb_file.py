"""Reads and writes what wandb writes offline, which its Python package cannot, and takes what `wandb sync` uploads."""

from __future__ import annotations

import gzip
import json
import re
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format: blocks of 32 KiB, in them pieces of (crc, length, type, data).

    Raises AssertionError where `wandb sync` would not go on: at a last record that is not whole.
    """
    # wandb's own file header of 7 bytes takes the place of the first bytes of the first block
    assert content.startswith(b":W&B")
    position, parts, whole = _HEADER, b"", True
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data = content[position + _HEADER : position + _HEADER + length]
        assert kind != 0
        position += _HEADER + length
        parts = data if kind in (_FULL, _FIRST) else parts + data
        whole = kind in (_FULL, _LAST)
        if whole and position <= len(content):
            yield parts
    assert whole
    assert position == len(content) or not content[position:].strip(b"\0"), "a record that is not whole"


def pieces(contents: Iterable[bytes]) -> bytes:
    """Return a file of these records."""
    file = bytearray(struct.pack("<4sHB", b":W&B", 0xBEE1, 0))
    for content in contents:
        begun = False
        while True:
            left = _BLOCK - len(file) % _BLOCK
            if left < _HEADER:
                file += bytes(left)
                continue
            data, content = content[: left - _HEADER], content[left - _HEADER :]
            kind = (_MIDDLE if content else _LAST) if begun else (_FIRST if content else _FULL)
            file += struct.pack("<IH", zlib.crc32(bytes([kind]) + data), len(data)) + bytes([kind]) + data
            begun = True
            if not content:
                break
    return bytes(file)


def record(step: int, row: dict[str, Any]) -> bytes:
    """Return the record of one row."""
    whole = wandb_internal_pb2.Record()
    whole.history.step.num = step
    for key, value in (row | {"_step": step}).items():
        item = whole.history.item.add()
        item.key, item.value_json = key, json.dumps(value)
    return whole.SerializeToString()


def history(file: Path) -> list[dict[str, Any]]:
    """Return the rows that were logged, in order, with wandb's own step as `_step`."""
    rows = []
    for content in records(file.read_bytes()):
        whole = wandb_internal_pb2.Record()
        whole.ParseFromString(content)
        if whole.WhichOneof("record_type") == "history":
            items = whole.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            row.setdefault("_step", whole.history.step.num)
            rows.append(row)
    return rows


def artifacts(run: Path) -> list[tuple[str, str, list[str]]]:
    """Return (name, type, aliases) of what a run keeps, in order, without its tables."""
    found = []
    for file in sorted((run / "wandb").glob("wandb/offline-run-*/*.wandb")):
        for content in records(file.read_bytes()):
            whole = wandb_internal_pb2.Record()
            whole.ParseFromString(content)
            kinds = (whole.artifact, whole.request.log_artifact.artifact)
            found += [
                (each.name, each.type, list(each.aliases)) for each in kinds if each.type in ("model", "checkpoint")
            ]
    return found


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the rows of all folders of a run, in the order of their starts."""
    return [row for file in sorted((run / "wandb").glob("wandb/offline-run-*/*.wandb")) for row in history(file)]


class Offline:
    """Stands for the package: its runs write their files here, and lose at a kill what they had not flushed."""

    def __init__(self) -> None:
        self.runs: list[OfflineRun] = []
        self.Settings = SimpleNamespace

    def init(self, *, dir: str, id: str, **rest: Any) -> OfflineRun:
        assert rest["mode"] == "offline"
        folder = Path(dir, "wandb", f"offline-run-20300101_{len(self.runs):06d}-{id}")
        (folder / "files").mkdir(parents=True)
        self.runs.append(OfflineRun(folder, folder / f"run-{id}.wandb"))
        return self.runs[-1]


class OfflineRun:
    def __init__(self, folder: Path, file: Path):
        self.dir, self.file, self.rows = str(folder / "files"), file, list[bytes]()
        self.kill(0)

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append(record(step, row))

    def kill(self, share: float) -> None:
        """End, with this share of the bytes on disk."""
        whole = pieces([wandb_internal_pb2.Record(run={"run_id": "x"}).SerializeToString(), *self.rows])
        self.file.write_bytes(whole[: max(_HEADER, round(share * len(whole)))])

    def finish(self) -> None:
        self.kill(1)


class Service(ThreadingHTTPServer):
    """What `wandb sync` needs of the service: runs whose rows are added behind those that are there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.rows: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Service:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "me"}}
        run: dict[str, Any] = {"id": "r", "name": variables.get("name"), "historyLineCount": len(self.rows)}
        if name == "UpsertBucket":
            return {"upsertBucket": {"bucket": run | {"displayName": "x", "project": project}, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":  # it is there already, so that nothing of it is asked for
            latest = {"id": "a", "versionIndex": 0}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": latest}}
            return {"createArtifact": {"artifact": artifact}}
        if name == "RunResumeStatus":
            last = json.dumps(self.rows[max(self.rows)] if self.rows else {})
            run |= {"summaryMetrics": last, "historyTail": json.dumps([last]), "eventsTail": "[]", "config": "{}"}
            run |= {"logLineCount": 0, "eventsLineCount": 0, "tags": [], "wandbConfig": '{"t": 1}'}
            return {"model": project | {"bucket": run if self.rows else None}}
        return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}


class _Requests(BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *_: Any) -> None:
        pass

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            answer = {"data": self.server.answer(name[1] if name else "", asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            sent = (json.loads(body).get("files") or {}).get("wandb-history.jsonl", {"content": [], "offset": 0})
            for line, row in enumerate(sent["content"], sent["offset"]):
                self.server.rows[line] = json.loads(row)
        said = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = do_PUT = _respond
