"""`distrain ui` as a command: its address, and that it ends when it is asked to."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from made_runs import MadeRun

START = "import sys; sys.argv = ['distrain', 'ui', *sys.argv[1:]]; from distrain.cli.main import main; main()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_address_is_printed_and_the_command_ends(number: signal.Signals, tmp_path: Path) -> None:
    MadeRun(tmp_path / "run")
    command = [sys.executable, "-c", START, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}$", line.strip())
        assert address, line
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address[0].partition("?")[0], timeout=120)
        process.send_signal(number)
        assert process.wait(120) == 0
        assert process.stderr.read() == ""
