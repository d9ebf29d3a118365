"""`lascaux verify`: every hash of a run, checkpoints and data alike."""

from pathlib import Path

from lascaux.checkpoint.verify import Finding, verify_run
from lascaux.data.shards import is_prepared, open_prepared
from lascaux.data.sources import STDLIB
from lascaux.errors import CheckpointError, DataError
from lascaux.train.run_folder import saved_config


def verify_all(run: Path) -> list[Finding]:
    """One finding for each checkpoint file and each prepared data folder of a run.

    Raises: CheckpointError where the folder is no run.
    """
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder '{run}'")
    config = saved_config(run)
    sources = [Path(source.path) for source in config.data.sources if source.path != STDLIB]
    folders = [folder for folder in (run / "data", *sources) if is_prepared(folder)]
    return verify_run(run) + [verify_data(folder) for folder in folders]


def verify_data(folder: Path) -> Finding:
    """Whether a prepared folder is what its index says."""
    try:
        data = open_prepared(folder)
        data.check_hashes()
    except DataError as error:
        return Finding(path=folder, ok=False, detail=str(error))
    tokens = data.tokens("train") + data.tokens("valid")
    return Finding(path=folder, ok=True, detail=f"{tokens:,} tokens")
