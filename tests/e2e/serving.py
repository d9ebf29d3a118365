"""`lascaux serve` in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LASCAUX = [sys.executable, "-m", "lascaux"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@dataclass
class Serving:
    process: "subprocess.Popen[str]"
    figures: Mapping[str, Any]

    @property
    def url(self) -> str:
        return str(self.figures["url"])

    def ends(self, seconds: float = 60) -> tuple[int, str]:
        """Exit code and everything on stderr."""
        _, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, err


@contextmanager
def serving(run: Path, *flags: str) -> Iterator[Serving]:
    """A server of this run on a free port, once it answers."""
    command = [*LASCAUX, "serve", str(run), "--port", "0", "--json", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield Serving(process, json.loads(line))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
