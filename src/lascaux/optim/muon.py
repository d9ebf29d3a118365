"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024).

Ours and not torch.optim.Muon, because that one computes in bf16 alone: on a CPU without bf16
instructions a step takes fifty times as long (docs/decisions.md). Here the dtype is that of the
hardware and matrices of one shape are iterated together. Equal to torch's otherwise; tests compare
the two. Shapes: N matrices of R rows and C columns.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lascaux.parallel.shards import local, slab_of, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic, steep at zero (Jordan et al. 2024)
RMS_OF_ADAMW = 0.2
ELEMENTS_AT_ONCE = 2**26  # 256 MiB in fp32


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised and scaled to the size of an AdamW update.

    Scale 0.2 · √max(R, C) (Liu et al. 2025, equation 4): a learning rate means what it means for
    AdamW. Weight decay is decoupled. `compute_dtype` is that of the orthogonalisation alone.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        newton_schulz_steps: int,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__(
            parameters,
            dict(
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                newton_schulz_steps=newton_schulz_steps,
                compute_dtype=compute_dtype,
            ),
        )

        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "a closure would be called once; call backward before step"
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                at_once = max(1, ELEMENTS_AT_ONCE // shape.numel())
                for start in range(0, len(parameters), at_once):
                    self._update(parameters[start : start + at_once], group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Move parameters of one shape."""
        shape = parameters[0].shape
        directions = torch.stack([whole(self._momentum(p, group["momentum"])) for p in parameters])
        matrices = directions.view(-1, *shape[-2:])  # of 3-dimensional ones each has several
        updates = orthogonalise(matrices, group["newton_schulz_steps"], group["compute_dtype"])
        updates = updates.view(-1, *shape)
        scale = group["lr"] * RMS_OF_ADAMW * max(shape[-2:]) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            own = update[slab_of(parameter)].to(parameter.dtype)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            local(parameter).add_(own, alpha=-scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The gradient, looking one step ahead along its running average."""
        assert parameter.grad is not None
        buffer = self.state[parameter]["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonalise(
    matrices: Float[Tensor, "N R C"], steps: int, dtype: torch.dtype
) -> Float[Tensor, "N R C"]:
    """Bring all singular values close to one by Newton–Schulz iterations on the smaller side."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(dtype)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT
