"""Checking a whole run: every file of every checkpoint against its hash."""

import os
from dataclasses import dataclass
from pathlib import Path

from lascaux.checkpoint.files import check_file
from lascaux.checkpoint.load import list_checkpoints
from lascaux.checkpoint.manifest import MANIFEST_NAME, read_manifest
from lascaux.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one file: `detail` is its size, or the whole message of the problem."""

    path: Path
    ok: bool
    detail: str


def verify_run(run: Path) -> list[Finding]:
    """Read every checkpoint of RUN/checkpoints, newest first.

    A checkpoint whose manifest is wrong, or which lacks a file, gives one finding for its folder;
    what its other files should be is then unknown. A run without checkpoints gives none.

    Raises: CheckpointError if `run` is not a folder, or its checkpoints cannot be listed.
    """
    if not os.path.isdir(run):
        raise CheckpointError(f"there is no run folder {run} that can be read")
    return [
        finding for path in list_checkpoints(run / "checkpoints") for finding in _findings(path)
    ]


def _findings(checkpoint: Path) -> list[Finding]:
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return [Finding(checkpoint, False, str(error))]
    findings = [Finding(checkpoint / MANIFEST_NAME, True, f"step {manifest.step:,}")]
    for name, record in manifest.files.items():
        try:
            check_file(checkpoint / name, record)
        except CheckpointError as error:
            findings.append(Finding(checkpoint / name, False, str(error)))
        else:
            findings.append(Finding(checkpoint / name, True, f"{record.size:,} bytes"))
    return findings
