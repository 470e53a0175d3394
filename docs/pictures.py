"""Makes the pictures of the pages, in light and dark, from real runs: python docs/pictures.py [--keep FOLDER] [NAME...]

It trains small runs, some of which it kills and resumes, and draws what the commands print, `distrain watch`, `distrain
ui` and a report, into docs/images/. The pages show a picture as

    <picture><source media="(prefers-color-scheme: dark)" srcset="images/NAME-dark.svg"><img …></picture>

which a repository's page obeys; conf.py makes of it what the site obeys. A test holds that each picture is here, is
named by a page, and is one of those in the list. It takes some minutes, Chromium (scripts/install-chromium.sh) and the
packages of the extra `dev`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import html
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parents[1]
IMAGES = Path(__file__).parent / "images"
HOST, FOLDER = "workstation", "/home/you/distrain"
"""What the pictures show in place of this machine's name and of the folder that the runs are in."""
_COMMAND = (
    f"import socket, sys; socket.gethostname = lambda: {HOST!r}; sys.argv[0] = 'distrain'; "
    "from distrain.cli.main import main; main()"
)
_LONGEST_S = 1800.0


@dataclass(frozen=True)
class Command:
    """What a command prints on a terminal."""

    name: str
    arguments: tuple[str, ...]
    columns: int = 100
    until: float = 1.0
    """Only as far as the line of progress after this share of the steps."""
    suffix: ClassVar[str] = "svg"

    def draw(self, stage: Stage, dark: bool) -> bytes:
        """Return the picture."""
        out = stage.printed(self.arguments, self.columns)
        if self.until < 1:
            told = re.finditer(r"step (\d+)/(\d+) ", out)
            out = out[: out.index("\r", next(each.end() for each in told if int(each[1]) >= self.until * int(each[2])))]
        typed = " ".join(("$ distrain", *self.arguments))
        return svg([f"\x1b[1m{typed}\x1b[0m", *screen(out)], self.columns, dark).encode()


@dataclass(frozen=True)
class Dashboard:
    """`distrain watch`."""

    name: str
    folder: str
    columns: int
    lines: int
    suffix: ClassVar[str] = "svg"

    def draw(self, stage: Stage, dark: bool) -> bytes:
        """Return the picture."""
        from distrain.report.watching import Watch

        async def shown() -> str:
            app = Watch(Path(self.folder))
            async with app.run_test(size=(self.columns, self.lines)) as pilot:
                if not dark:
                    await pilot.press("l")
                for _ in range(20):
                    await pilot.pause(0.2)
                return str(app.export_screenshot())

        stage.begin_live()
        return bare(stage.nobodys(asyncio.run(shown())), dark, "#121212" if dark else "#e0e0e0").encode()


@dataclass(frozen=True)
class Shot:
    """A page in a browser: a report, or one of `distrain ui`."""

    name: str
    place: str
    """The folder of a run, or what follows # in the address of `distrain ui`; {RUN} is the page's name for a run."""
    height: int = 860
    width: int = 1280
    ready: str = "true"
    """An expression of JavaScript that holds once all is drawn."""
    suffix: ClassVar[str] = "png"

    def draw(self, stage: Stage, dark: bool) -> bytes:
        """Return the picture."""
        page = stage.page(self, dark)
        page.wait_for(self.ready)
        time.sleep(1)  # curves are drawn when they have come
        page.evaluate(f"({_HIDE})({json.dumps([[str(stage.folder), FOLDER], [stage.host, HOST]])})")
        drawn = quantised(page.screenshot(stage.folder / "shot.png"))
        page.close()
        return drawn


_HIDE = """pairs => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());)
    for (const [from, to] of pairs)
      if (node.nodeValue.includes(from)) node.nodeValue = node.nodeValue.replaceAll(from, to);
}"""
_DRAWN = "document.querySelectorAll('.u-over').length > 2"

PICTURES: list[Command | Dashboard | Shot] = [
    Command("train", ("train", "recipes/digits.yaml", "--processes", "2")),
    Command("progress", ("train", "recipes/digits.yaml", "--processes", "2"), until=0.55),
    Command("plan", ("plan", "gpt.yaml", "--gpu", "h100", "--gpus-per-node", "8"), 80),
    Command("compare", ("compare", "runs/digits", "runs/slower", "runs/wider"), 80),
    Command("status", ("status",)),
    Command("doctor", ("doctor",), 80),
    Dashboard("watch", "runs", 120, 40),
    Dashboard("watch-80", "runs/long", 80, 24),
    Shot("report", "runs/python-source", 1150),
    Shot("ui-list", "/", 310, ready="document.querySelectorAll('.table tbody tr').length > 4"),
    Shot("ui-run", "/run/{runs/python-source}", ready=_DRAWN),
    Shot("ui-compare", "/compare/{runs/digits},{runs/slower},{runs/wider}", ready=_DRAWN),
]


_LARGE = """
name: gpt-7b
task: language_modeling
data: {name: python_source, seq_len: 2048, max_bytes: 4_000_000, split: [0.95, 0.05]}
model: {name: gpt, n_layer: 32, n_head: 32, d_model: 4096, positions: rotary}
optim: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.95], weight_decay: 0.1, clip_norm: 1.0}
batch: {global: 64}
train: {steps: 1000, precision: bf16}
"""


def files(name: str) -> list[str]:
    """Return the names of a picture's files."""
    return [f"{each.name}-{how}.{each.suffix}" for each in PICTURES if each.name == name for how in ("light", "dark")]


# --------------------------------------------------------------------------------------------------------------------
# The runs


class Stage:
    """A folder of real runs, where commands are run as on a machine of nobody in particular."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname()
        self._ends = contextlib.ExitStack()
        self._printed: dict[tuple[str, ...], str] = {}
        self._live = False
        self._address = ""
        self._browser: Any = None

    def __enter__(self) -> Stage:
        os.chdir(self.folder)
        if not Path("recipes").exists():
            shutil.copytree(ROOT / "recipes", "recipes")
        Path("gpt.yaml").write_text(_LARGE)
        self._train()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _train(self) -> None:
        """Train what the pictures show: three runs to compare, and one that was killed twice and stopped once."""
        digits = ("train", "recipes/digits.yaml")
        self.printed((*digits, "--processes", "2"), 100)
        self.printed((*digits, "--run-dir", "runs/slower", "optim.lr=3e-4"), 100)
        self.printed((*digits, "--run-dir", "runs/wider", "model.channels=[48, 96]", "batch.global=128"), 100)
        language = ("train", "recipes/python_source.yaml", "train.steps=900", "checkpoint.every=60 steps")
        more = ("eval.every=60 steps", "log.every=5 steps", "log.report=true")
        run = Path("runs/python-source")
        for step, how in ((200, signal.SIGKILL), (430, signal.SIGKILL), (610, signal.SIGTERM), (900, signal.SIGTERM)):
            if (run / "FINISHED").exists() or _step(run) >= step:
                continue  # of an earlier call
            with self._begun((*language, *more)) as process:
                until = time.monotonic() + _LONGEST_S
                while process.poll() is None and time.monotonic() < until:
                    if step < 900 and _step(run) >= step:
                        os.killpg(process.pid, how)
                        process.wait()
                    time.sleep(0.2)
        if not (run / "FINISHED").exists():
            raise SystemExit(f"{run.absolute()} has not finished; see `distrain status` and its logs")

    @contextlib.contextmanager
    def _begun(self, arguments: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
        """Start a command in the background; it is killed at the end of the block."""
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments], text=True, start_new_session=True, env=_variables(),
            stdout=subprocess.PIPE if arguments[0] == "ui" else subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def begin_live(self) -> None:
        """Have a run train until the end, for what shows runs as they go."""
        if not self._live:
            self._live = True
            shutil.rmtree("runs/long", ignore_errors=True)
            steps = ("train.steps=100000", "eval.every=100 steps", "checkpoint.every=500 steps")
            recipe = ("train", "recipes/python_source.yaml", "--run-dir", "runs/long", "--processes", "2")
            self._ends.enter_context(self._begun((*recipe, *steps)))
            until = time.monotonic() + _LONGEST_S
            while _step(Path("runs/long")) < 150 and time.monotonic() < until:
                time.sleep(1)

    def printed(self, arguments: tuple[str, ...], columns: int) -> str:
        """Run a command on a terminal that wide, once, and return what it has written to it."""
        kept = Path(f"{'-'.join(arguments).replace('/', '_')}.ansi")
        if arguments not in self._printed and not kept.exists():
            if arguments[0] == "status":
                self.begin_live()
            pid, end = pty.fork()
            if pid == 0:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
                os.execve(sys.executable, [sys.executable, "-c", _COMMAND, *arguments], _variables())
            written = b""
            with contextlib.suppress(OSError):  # of a terminal that nobody is at
                while data := os.read(end, 1 << 16):
                    written += data
            os.close(end)
            if os.waitpid(pid, 0)[1]:
                raise SystemExit(f"distrain {' '.join(arguments)} failed:\n{written.decode()}")
            kept.write_bytes(written)
        return self._printed.setdefault(arguments, self.nobodys(kept.read_bytes().decode()))

    def nobodys(self, text: str) -> str:
        """Return a text without what is this machine's."""
        shown = {
            str(self.folder): FOLDER,
            str(ROOT): FOLDER,
            str(Path.home()): str(Path(FOLDER).parent),
            self.host: HOST,
        }
        for mine, other in shown.items():
            text = text.replace(mine, other)
        return text

    def page(self, shot: Shot, dark: bool) -> Any:
        """Open what a picture is of in the browser."""
        if self._browser is None:
            sys.path.insert(0, str(ROOT / "tests" / "support"))
            from browser import Browser

            self._browser = self._ends.enter_context(Browser())
        if not shot.place.startswith("/"):
            report = Path(shot.place, "report.html").absolute()
            return self._browser.open(report, width=shot.width, height=shot.height, dark=dark)
        self.begin_live()
        if not self._address:
            server = self._ends.enter_context(self._begun(("ui", "runs", "--port", "0")))
            assert server.stdout is not None
            self._address = server.stdout.readline().split()[-1]
        page = self._browser.open(self._address, width=shot.width, height=shot.height, dark=dark)
        page.wait_for("document.querySelectorAll('.table tbody tr').length > 4")
        link = "[...document.querySelectorAll('.table tbody a')].find(a => a.innerText.trim() === {!r}).hash"

        def called(name: re.Match[str]) -> str:
            return str(page.evaluate(link.format(Path(name[1]).name))).split("/")[2]

        page.evaluate(f"location.hash = {'#' + re.sub(r'{(.*?)}', called, shot.place)!r}")
        return page


def _variables() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    return kept | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


def _step(run: Path) -> int:
    """Return the last step that a run has written a row of."""
    try:
        rows = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(row).get("step", 0) for row in rows[-3:-1]), default=0)


# --------------------------------------------------------------------------------------------------------------------
# Drawing


def screen(written: str) -> list[str]:
    """Return the lines that stay on a terminal, with their colours: of a line that is written anew the last."""
    lines, at = [""], 0
    for part in re.split(r"(\r\n|\n|\r|\x1b\[[?0-9;]*[A-Za-z])", written):
        if part in ("\r\n", "\n"):
            at += 1
            lines += [""] * (at == len(lines))
        elif part.startswith("\x1b[") and part[-1] == "K":
            lines[at] = ""
        elif part.startswith("\x1b[") and part[-1] == "A":
            at -= int(part[2:-1] or 1)
        elif not part.startswith("\x1b[") or part[-1] == "m":
            lines[at] += part.strip("\r")
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    return lines


def svg(lines: list[str], columns: int, dark: bool) -> str:
    """Return lines of a terminal as a picture."""
    from rich.console import Console
    from rich.terminal_theme import TerminalTheme
    from rich.text import Text

    console = Console(
        width=columns, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        legacy_windows=False,
    )  # fmt: skip
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    bright = "#d1242f #1a7f37 #9a6700 #0969da #8250df #1b7c83" if not dark else (
        "#ff7b72 #7ee787 #d29922 #79c0ff #d2a8ff #76e3ea"
    )  # fmt: skip
    colours = [tuple(bytes.fromhex(each[1:])) for each in bright.split()]
    ends = [(36, 41, 47), (246, 248, 250)] if not dark else [(13, 17, 23), (230, 237, 243)]
    normal = [ends[0], *colours, ends[1]]
    theme = TerminalTheme(
        ends[0] if dark else (255, 255, 255), ends[1] if dark else ends[0],
        normal, [(110, 119, 129), *colours, ends[1]],
    )  # fmt: skip
    return bare(console.export_svg(theme=theme), dark, "#0d1117" if dark else "#ffffff")


def bare(drawn: str, dark: bool, ground: str) -> str:
    """Return a picture that Rich has drawn without a window's title and buttons, and without fonts from elsewhere."""
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<text class="[^"]*-title".*?</text>', "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g transform="translate\(26,22\)">.*?</g>', "", drawn, flags=re.DOTALL)
    drawn = drawn.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas, Liberation Mono")
    # the room of the title
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn).groups())  # type: ignore[union-attr]
    drawn = re.sub(r'viewBox="[^"]*"', f'viewBox="0 30 {width:g} {height - 30:g}"', drawn, count=1)
    edge = "#30363d" if dark else "#d0d7de"
    frame = (
        f'<rect fill="{ground}" stroke="{edge}" x="1" y="31" width="{width - 2:g}" height="{height - 32:g}" rx="8"/>'
    )
    drawn = re.sub(r'<rect fill="[^"]*" stroke="[^"]*"[^>]*rx="8"/>', frame, drawn, count=1)
    drawn = re.sub(r'(<text [^>]*?) x="([^"]*)"([^>]*?) textLength="([^"]*)"([^>]*)>([^<]*)</text>', _placed, drawn)
    return re.sub(r"\n[ \t]*", "\n", drawn)


def _placed(found: re.Match[str]) -> str:
    """Return a text of which each letter has its place, where fonts differ in how wide a letter is."""
    before, start, more, length, rest, letters = found.groups()
    shown = html.unescape(letters)
    if shown.isascii() or not re.search("[\u2190-\u28ff]", shown):
        return found[0]
    step = float(length) / len(shown)
    places = " ".join(f"{float(start) + index * step:.0f}" for index in range(len(shown)))
    return f'{before} x="{places}"{more}{rest}>{letters}</text>'


def quantised(path: Path) -> bytes:
    """Return a picture of few colours as PNG of few bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(each.name for each in PICTURES)}")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the runs, which a later call finds; else they are deleted"
    )
    parser.add_argument("--out", type=Path, default=IMAGES, help="where the pictures go; else docs/images")
    asked = parser.parse_args()
    out = asked.out.absolute()
    unknown = {*asked.names} - {each.name for each in PICTURES}
    if unknown:
        parser.error(f"there is no picture {', '.join(sorted(unknown))}")
    with contextlib.ExitStack() as stack:
        # as long as what is shown in its place
        start = "pictures-".ljust(max(len(FOLDER) - len(tempfile.gettempdir()) - 9, 1), "-")[:10]
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=start)))
        folder.mkdir(parents=True, exist_ok=True)
        stage = stack.enter_context(Stage(folder.resolve()))
        for each in PICTURES:
            if asked.names and each.name not in asked.names:
                continue
            for file, dark in zip(files(each.name), (False, True), strict=True):
                (out / file).write_bytes(each.draw(stage, dark))
                print(f"{(out / file).stat().st_size / 1000:6.0f} kB  {file}")


if __name__ == "__main__":
    main()
