"""`lascaux verify`: every hash of a run, checkpoints and data alike."""

from pathlib import Path

from lascaux.checkpoint.load import list_checkpoints
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.verify import Finding, verify_run
from lascaux.data.shards import open_prepared
from lascaux.data.tokenizer import load_tokenizer
from lascaux.errors import CheckpointError, DataError, LascauxError
from lascaux.train.run_folder import saved_config


def verify_all(run: Path) -> list[Finding]:
    """One finding for each checkpoint file and each prepared data folder of a run.

    Raises: CheckpointError where the folder is no run.
    """
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder '{run}'")
    config = saved_config(run)
    if (run / "data").exists():
        folders = [run / "data"]
    elif not trained(run):
        folders = []
    else:
        folders = [Path(source.path).expanduser() for source in config.data.sources]
    findings = verify_run(run) + [verify_data(folder) for folder in folders]
    return [*findings, verify_tokenizer(run)]


def trained(run: Path) -> bool:
    """Whether the newest checkpoint has seen data; imported weights have not."""
    checkpoints = list_checkpoints(run / "checkpoints")
    try:
        return not checkpoints or read_manifest(checkpoints[0]).state["data_identity"] is not None
    except CheckpointError:
        return True


def verify_tokenizer(run: Path) -> Finding:
    """Whether RUN/tokenizer.json is the tokenizer the newest checkpoint was trained with."""
    path = run / "tokenizer.json"
    try:
        checkpoints = list_checkpoints(run / "checkpoints")
        wanted = read_manifest(checkpoints[0]).state["tokenizer_sha256"] if checkpoints else None
        found = load_tokenizer(path).sha256
    except LascauxError as error:
        return Finding(path=path, ok=False, detail=str(error))
    if wanted not in (None, found):
        return Finding(path=path, ok=False, detail=f"expected hash {wanted}, found {found}")
    return Finding(path=path, ok=True, detail="tokenizer")


def verify_data(folder: Path) -> Finding:
    """Whether a prepared folder is what its index says."""
    try:
        data = open_prepared(folder)
        data.check_hashes()
    except DataError as error:
        return Finding(path=folder, ok=False, detail=str(error))
    tokens = data.tokens("train") + data.tokens("valid")
    return Finding(path=folder, ok=True, detail=f"{tokens:,} tokens")
