"""AdamW, or Muon for the matrices of the blocks with AdamW for everything else.

AdamW is torch's, fused; Muon stands in `muon.py`. Weight decay applies to matrices and embeddings,
not to norms and biases. Optimizer state is exchanged with checkpoints under the parameters' names.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lascaux.config.schema import OptimizerConfig
from lascaux.errors import CheckpointError
from lascaux.model.init import EMBEDDINGS
from lascaux.optim.muon import Muon
from lascaux.parallel.plan import TIED_COPY
from lascaux.parallel.shards import Slab, as_shard, slab_of

DEFAULT_MUON_MOMENTUM = 0.95
DEFAULT_NEWTON_SCHULZ_STEPS = 5
STATE_KEYS: dict[type[Optimizer], tuple[str, ...]] = {
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum_buffer",),
}


Named = Iterable[tuple[str, nn.Parameter]]
"""parameters with their names; of a split model those that this process has a part of"""


def build_optimizers(
    parameters: Named,
    config: OptimizerConfig,
    precision: str = "fp32",
    deterministic: bool = False,
) -> list[Optimizer]:
    """The optimizers that together own every parameter once; Muon comes first where it is used.

    Muon takes the two-dimensional weights inside blocks, and orthogonalises in bf16 where the
    network computes in it, as on every GPU. `deterministic` leaves out torch's fused AdamW, which
    rounds the last elements of a tensor otherwise than those it takes several at a time.
    """
    named = {name: p for name, p in parameters if p.requires_grad}
    in_bf16 = precision == "bf16" or any(parameter.is_cuda for parameter in named.values())
    dtype = next(iter(named.values())).dtype
    kept_apart = {*EMBEDDINGS, TIED_COPY}
    embeddings = [p for n, p in named.items() if n in kept_apart]
    if config.name == "adamw":
        others = [p for n, p in named.items() if n not in kept_apart]
        return [
            _adamw(
                [(others, config.lr), (embeddings, config.embedding_lr or config.lr)],
                config,
                not deterministic,
            )
        ]
    matrices = {n: p for n, p in named.items() if _is_matrix_of_a_block(n, p)}
    others = [p for n, p in named.items() if n not in matrices and n not in kept_apart]
    muon = Muon(
        list(matrices.values()),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=DEFAULT_MUON_MOMENTUM if config.muon_momentum is None else config.muon_momentum,
        newton_schulz_steps=config.muon_newton_schulz_steps or DEFAULT_NEWTON_SCHULZ_STEPS,
        compute_dtype=torch.bfloat16 if in_bf16 else torch.promote_types(torch.float32, dtype),
    )
    _remember_peak_lr(muon)
    lr = config.adamw_lr or config.lr
    return [
        muon,
        _adamw([(others, lr), (embeddings, config.embedding_lr or lr)], config, not deterministic),
    ]


def _is_matrix_of_a_block(name: str, parameter: Tensor) -> bool:
    """Or a matrix for each expert. A router's rows stand for experts and are no such matrix."""
    return name.startswith("blocks.") and parameter.ndim >= 2 and not name.endswith("router.weight")


def _adamw(
    parts: Iterable[tuple[list[nn.Parameter], float]], config: OptimizerConfig, fused: bool
) -> Optimizer:
    """AdamW over lists of parameters with a learning rate each; only matrices decay."""
    groups: list[dict[str, Any]] = []
    for parameters, lr in parts:
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        groups.append({"params": matrices, "lr": lr, "weight_decay": config.weight_decay})
        groups.append({"params": vectors, "lr": lr, "weight_decay": 0.0})
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
        foreach=False if not fused else None,
    )
    _remember_peak_lr(optimizer)
    return optimizer


def _remember_peak_lr(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]


def set_lr(optimizers: Iterable[Optimizer], fraction: float) -> float:
    """Set every learning rate to this fraction of its peak; return that of the first group."""
    first: float | None = None
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction
            first = group["lr"] if first is None else first
    assert first is not None
    return first


def state_tensors(parameters: Named, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Every tensor of optimizer state as `PARAMETER.KEY`, for example `embed.weight.exp_avg`."""
    names = {parameter: name for name, parameter in parameters}
    return {
        f"{names[parameter]}.{key}": optimizer.state[parameter][key]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key in STATE_KEYS[type(optimizer)]
    }


def zero_state_tensors(parameters: Named, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """What `state_tensors` would give before the first step, were there anything then."""
    names = {parameter: name for name, parameter in parameters}
    return {
        f"{names[parameter]}.{key}": torch.zeros(() if key == "step" else parameter.shape)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key in STATE_KEYS[type(optimizer)]
    }


def load_state_tensors(
    parameters: Named,
    optimizers: Iterable[Optimizer],
    saved: Mapping[str, Tensor],
    read: Callable[[Mapping[str, Slab]], Mapping[str, Tensor]],
    *,
    part: bool = False,
) -> None:
    """Put back what `state_tensors` gave, onto each parameter's device, or this process's part.

    `saved` has name and shape of all that is there, `read` gives ranges of it. With `part` other
    processes have parameters that this one has not.

    Raises: CheckpointError when names or shapes are not exactly those of this model and optimizer.
    """
    names = {p: EMBEDDINGS[0] if name == TIED_COPY else name for name, p in parameters}
    slots = [
        (optimizer, parameter, key, f"{names[parameter]}.{key}")
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key in STATE_KEYS[type(optimizer)]
    ]
    for _, parameter, key, name in slots:
        _check_saved(saved, name, torch.Size([]) if key == "step" else parameter.shape)
    unused = sorted(saved.keys() - {name for *_, name in slots})
    if unused and not part:
        raise CheckpointError(
            f"the checkpoint holds optimizer state this run does not use: {unused[0]} "
            f"and {len(unused) - 1} more; was it saved with another optimizer.name?"
        )
    tensors = read({name: () if key == "step" else slab_of(p) for _, p, key, name in slots})
    for optimizer, parameter, key, name in slots:
        own = tensors[name].to(parameter.device, copy=True)
        placed = own if key == "step" else as_shard(own, parameter)
        optimizer.state[parameter][key] = placed


def _check_saved(saved: Mapping[str, Tensor], name: str, wanted: torch.Size) -> None:
    if name not in saved:
        raise CheckpointError(
            f"the checkpoint holds no optimizer state '{name}'; was it saved with another "
            "optimizer.name?"
        )
    if saved[name].shape != wanted:
        raise CheckpointError(
            f"optimizer state '{name}' has shape {tuple(saved[name].shape)} in the checkpoint; "
            f"this run needs {tuple(wanted)}"
        )
