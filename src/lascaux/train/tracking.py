"""The metrics once more, for TensorBoard or Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lascaux.config.load import to_tables
from lascaux.config.schema import Config
from lascaux.errors import ConfigError


class Tracker(Protocol):
    """Where metrics go besides RUN/metrics.jsonl."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One step's record."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class NoTracker:
    """Nowhere."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Nothing to do: metrics.jsonl has it."""

    def close(self) -> None:
        """Nothing to do."""


class TensorBoardTracker:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """A scalar for each number, at the record's step."""
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run named after the run folder and continued with it."""

    def __init__(self, run: Path, config: Config) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project="lascaux",
            name=run.name,
            id=run.name,
            resume="allow",
            dir=str(run),
            config=to_tables(config),
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """The record as it is."""
        self._run.log(dict(metrics), step=metrics["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def make_tracker(config: Config, run: Path, last_step: int) -> Tracker:
    """The tracker `train.tracking` names.

    Raises: ConfigError where its package is not installed.
    """
    try:
        match config.train.tracking:
            case "none":
                return NoTracker()
            case "tensorboard":
                return TensorBoardTracker(run, last_step)
            case "wandb":
                return WandbTracker(run, config)
    except ImportError as error:
        raise ConfigError(
            f"'train.tracking' is '{config.train.tracking}' but that package is not installed "
            f"({error}); run: pip install 'lascaux[tracking]'"
        ) from error
