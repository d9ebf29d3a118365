"""The network in the dtype it computes in, beside the fp32 weights that the optimizer owns."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lascaux.config.schema import TrainConfig
from lascaux.data.loader import Batch
from lascaux.model.moe import Report, Router, routers_of, set_loss_scale
from lascaux.model.transformer import Transformer
from lascaux.parallel.blocks import prepare_blocks
from lascaux.parallel.microbatch import TreeSum, loss_sum

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def lower_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The network in `dtype`, but routers as they are: a rounded choice is another choice."""
    network = copy.deepcopy(model).to(dtype)
    for mine, theirs in zip(network.modules(), model.modules(), strict=True):
        if isinstance(theirs, Router):
            for name, parameter in theirs.named_parameters():
                setattr(mine, name, copy.deepcopy(parameter))
            mine.report = Report(theirs.config.num_experts).to(theirs.weight.device)
    return network


class WorkingCopy:
    """What computes losses and gradients: the model itself in fp32, else a copy in lower precision.

    The copy is rounded once for each step, not once for each use. Its gradients are in its dtype
    and are summed over micro-batches in the model's (Micikevicius et al. 2018, section 3.1).
    """

    def __init__(self, model: Transformer, train: TrainConfig) -> None:
        dtype = DTYPES[train.precision]
        self.model, self.model_config = model, model.config
        self.network = model if dtype == torch.float32 else lower_copy(model, dtype)
        prepare_blocks(self.network, train)
        self.routers = routers_of(self.network)
        self.deterministic = train.deterministic
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights as they are now."""
        if self.network is not self.model:
            torch._foreach_copy_(list(self.network.parameters()), list(self.model.parameters()))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights in fp32."""
        return self.model.named_parameters()

    def forward_backward(
        self, microbatches: Sequence[Batch], num_targets: int, lap: Callable[[str], None]
    ) -> Tensor:
        """Gradients of the sum of losses over `num_targets`; returns each micro-batch's share."""
        losses, total = [], TreeSum()
        tokens = sum(batch.tokens.size for batch in microbatches)
        set_loss_scale(self.routers, self.scaler.get_scale() / tokens)
        parameters = [parameter for _, parameter in self.named_parameters()]
        for batch in microbatches:
            loss = loss_sum(self.network, batch, self.device) / num_targets
            losses.append(loss.detach())
            lap("forward")
            self.scaler.scale(loss).backward()
            lap("backward")
            self.collect_gradients()
            if self.deterministic:
                total.add([cast(Tensor, p.grad) for p in parameters])
                for parameter in parameters:
                    parameter.grad = None
            lap("copy")
        if self.deterministic:
            for parameter, gradient in zip(parameters, total.result(), strict=True):
                parameter.grad = gradient
        return torch.stack(losses)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient."""
        return get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the copy's gradients to the model's and clear them."""
        if self.network is self.model:
            return  # they are the same tensors
        for weight, working in zip(self.model.parameters(), self.network.parameters(), strict=True):
            if working.grad is None:
                continue
            if weight.grad is None:
                weight.grad = working.grad.to(weight.dtype)
            else:
                weight.grad.add_(working.grad)
            working.grad = None
