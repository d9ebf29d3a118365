"""A model whose blocks are spread over pipeline stages, run by torch's schedules.

A stage is a `Transformer` without the parts that other stages have, so parameters keep their names.
Every process of a pipeline sees the same micro-batches; between stages only the residual stream
moves. The head of a model with tied embeddings has a copy of the embedding in the last stage: the
two start alike, get the sum of both gradients, and so stay alike.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from lascaux.config.schema import Config
from lascaux.data.loader import Batch
from lascaux.model.moe import routers_of, set_loss_scale
from lascaux.model.transformer import Transformer
from lascaux.parallel.apply import Initialise, release_weights, split_model
from lascaux.parallel.context import cut_sequences
from lascaux.parallel.microbatch import loss_scale, network_inputs
from lascaux.parallel.plan import TIED_COPY, stage_layers, stages_of
from lascaux.parallel.shards import local
from lascaux.parallel.world import World, add_tensor_parallel_gradients, gradient_norm


class PipelineModel:
    """This process's stages of one model; `num_microbatches` are those of a step."""

    def __init__(
        self,
        config: Config,
        world: World,
        dtype: torch.dtype,
        num_microbatches: int,
        initialise: Initialise,
    ) -> None:
        parallel, layers = config.parallel, config.model.num_layers
        self.config, self.world = config, world
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=False)
        self.num_microbatches, self.num_targets = num_microbatches, 1
        self.num_stages = parallel.pp * parallel.virtual_pp
        ranges = stage_layers(layers, self.num_stages)
        own = stages_of(world.place["pp"], parallel.pp, parallel.virtual_pp)
        self.models: dict[int, Transformer] = {}
        for stage in own:
            model = make_stage(config, ranges[stage], stage == 0, stage == self.num_stages - 1)
            split_model(model, world, config, dtype)
            initialise(model, world.device, config.train.seed)
            self.models[stage] = model
        self._sharded = [  # FSDP swaps them in the models
            (TIED_COPY if name == "embed.weight" and stage > 0 else name, parameter)
            for stage, model in self.models.items()
            for name, parameter in model.named_parameters()
        ]
        self.model_config = config.model
        self.routers = {
            n: r for model in self.models.values() for n, r in routers_of(model).items()
        }
        stages: list[Any] = [self._pipeline_stage(stage, dtype) for stage in own]
        make = (
            partial(Schedule1F1B, stages[0])
            if parallel.schedule == "1f1b"
            else partial(ScheduleInterleaved1F1B, stages)
        )
        self.schedule = make(num_microbatches, loss_fn=self._share, scale_grads=False)

    @property
    def has_first(self) -> bool:
        """Whether the embedding is here."""
        return 0 in self.models

    @property
    def has_last(self) -> bool:
        """Whether the head is here."""
        return self.num_stages - 1 in self.models

    def _pipeline_stage(self, stage: int, dtype: torch.dtype) -> PipelineStage:
        """With the shapes of what comes and goes, which torch would otherwise find by a trial."""
        train, layout, model = self.config.train, self.world.layout, self.config.model
        device = self.world.device
        length = train.seq_len // layout.cp
        stream = (train.microbatch_seqs, length // layout.tp, model.d_model)
        x = torch.empty(stream, dtype=dtype, device=device, requires_grad=True)
        tokens = torch.empty(train.microbatch_seqs, length, dtype=torch.int64, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.empty(1, dtype=wide, device=device, requires_grad=True)
        return PipelineStage(
            self.models[stage],
            stage,
            self.num_stages,
            device,
            input_args=tokens if stage == 0 else x,
            output_args=loss if stage == self.num_stages - 1 else x,
            group=self.world.group("pp"),
        )

    def _share(self, sum_of_losses: Tensor, _: Tensor) -> Tensor:
        return sum_of_losses.sum() / self.num_targets

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of this process's stages; the tied copy has a name of its own."""
        return iter(self._sharded)

    def refresh(self) -> None:
        """FSDP rounds the weights anew each time it gathers them."""

    def forward_backward(
        self, microbatches: Sequence[Batch], num_targets: int, lap: Callable[[str], None]
    ) -> Tensor:
        """Gradients of the sum of losses over `num_targets`; each micro-batch's share of it.

        Processes without the last stage return zeros.
        """
        self.num_targets = num_targets
        set_loss_scale(self.routers, loss_scale(microbatches, self.world))
        losses = self._run(self.schedule.step, microbatches)
        add_tensor_parallel_gradients(self.world, (p for _, p in self.named_parameters()))
        self._add_tied_gradients()
        lap("backward")
        return losses

    def sum_losses(self, microbatches: Sequence[Batch]) -> Tensor:
        """The sum of losses of as many micro-batches as a step has; zero without the last stage."""
        self.num_targets = 1
        total = self._run(self.schedule.eval, microbatches).sum()
        for model in self.models.values():
            release_weights(model)
        return total

    def _run(self, run: Callable[..., object], microbatches: Sequence[Batch]) -> Tensor:
        layout = self.world.layout
        if layout.cp > 1:
            cut = partial(cut_sequences, index=self.world.place["cp"], cp=layout.cp)
            microbatches = [cut(batch) for batch in microbatches]
        each = [network_inputs(batch, self.world.device) for batch in microbatches]
        inputs = {
            name: torch.cat([one[name] for one in each])  # type: ignore[misc]
            for name, first in each[0].items()
            if first is not None
        }
        tokens = inputs.pop("tokens")
        if "positions" not in inputs:
            inputs["positions"] = torch.arange(tokens.shape[1], device=tokens.device).expand(
                tokens.shape
            )
        losses: list[Tensor] = []
        targets = inputs["targets"] if self.has_last else None
        arguments = (tokens,) if self.has_first else ()
        run(*arguments, target=targets, losses=losses, return_outputs=False, **inputs)
        if not self.has_last:
            return torch.zeros(len(microbatches), device=self.world.device)
        return torch.stack([loss.detach() for loss in losses])

    def _add_tied_gradients(self) -> None:
        """Give the embedding and the head's copy of it the sum of both gradients."""
        if not self.config.model.tie_embeddings or not (self.has_first or self.has_last):
            return
        ends = [self.models[stage] for stage in (0, self.num_stages - 1) if stage in self.models]
        own = [
            local(model.embed.weight.grad) for model in ends if model.embed.weight.grad is not None
        ]
        if len(own) == 2:
            own[0].add_(own[1])
            own[1].copy_(own[0])
            return
        group = self.world.group("pp")
        peer = group.size() - 1 if self.has_first else 0
        (mine,), other = own, torch.empty_like(own[0])
        sent_and_received = [
            dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(sent_and_received):
            work.wait()
        mine.add_(other)  # a + b = b + a, to the last bit

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, on every process."""
        own = (p for name, p in self.named_parameters() if name != TIED_COPY)
        return gradient_norm(self.world, own)


def make_stage(config: Config, layers: range, first: bool, last: bool) -> Transformer:
    """A network with some of the blocks, on the meta device; its forward pass is the stage's."""
    with torch.device("meta"):
        model = Transformer(config.model)
    for name in list(model.blocks):
        if int(name) not in layers:
            del model.blocks[name]
    tied_head = last and config.model.tie_embeddings
    unused = [] if first else ["position_embed", "embed_norm"]
    unused += [] if first or tied_head else ["embed"]
    unused += [] if last else ["final_norm", "head", "head_bias"]
    for name in unused:
        if hasattr(model, name):
            delattr(model, name)
    model.forward = partial(_run_stage, model, first, last)  # type: ignore[method-assign]
    return model


def _run_stage(
    model: Transformer,
    first: bool,
    last: bool,
    x: Tensor,
    *,
    targets: Tensor,
    positions: Tensor,
    document_ids: Tensor | None = None,
) -> Tensor:
    if first:
        x = model.begin(x, positions)
    x = model.run_blocks(x, positions, document_ids)
    return torch.stack([model.sum_losses(x, targets)]) if last else x
