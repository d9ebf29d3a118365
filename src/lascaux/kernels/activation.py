"""Non-linearities of feed-forward layers; GELU's tanh form without torch's slow tanh."""

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016), elementwise.

    In bf16 on a CPU it is GELU itself, which the approximation meets to 5e-4. Rounding to bf16
    moves the results more: as a whole they are within 6 % as close to the exact tanh form as those
    of torch's kernel, in less than a third of its time (docs/performance.md).
    """
    by_erf = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return F.gelu(x, approximate="none" if by_erf else "tanh")


def activate(name: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """The non-linearity of that name; silu(gate) · up for swiglu (Shazeer 2020)."""
    match name:
        case "swiglu":
            assert gate is not None
            return F.silu(gate) * up
        case "gelu":
            return F.gelu(up)
        case "gelu_tanh":
            return gelu_tanh(up)
        case "relu":
            return F.relu(up)
        case "relu_squared":  # Primer, So et al. 2021
            return F.relu(up).square()
    raise AssertionError(f"no activation {name}")
