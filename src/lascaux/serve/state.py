"""What the routes share."""

from dataclasses import dataclass, field

from lascaux.config.serve_schema import ServeConfig
from lascaux.serve.keys import Keys
from lascaux.serve.limits import ServerLimits
from lascaux.serve.metrics import Metrics
from lascaux.serve.refusals import Refusal
from lascaux.serve.served import Served

RETRY_SECONDS = "5"


@dataclass(kw_only=True)
class ServerState:
    """The model once it is loaded, who may call, and what goes on."""

    settings: ServeConfig
    keys: Keys
    limits: ServerLimits = field(default_factory=ServerLimits)
    metrics: Metrics = field(default_factory=Metrics)
    served: Served | None = None
    draining: bool = False
    """running requests are finished, new ones refused"""
    running: int = 0
    """requests being answered"""
    bodies_bytes: int = 0
    """of all bodies being received"""

    def model(self) -> Served:
        """The model. Raises: Refusal (503) before it is loaded and when the server ends."""
        retry = {"retry-after": RETRY_SECONDS}
        if self.draining:
            message = "the server is shutting down"
            raise Refusal(message, status=503, code="shutting_down", headers=retry)
        if self.served is None:
            raise Refusal("Loading model", status=503, code="loading_model", headers=retry)
        return self.served
