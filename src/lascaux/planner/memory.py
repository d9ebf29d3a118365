"""Bytes on each device, kind by kind, and on the worst device: weights to buffers.

Activations follow Korthikanti et al. 2022, section 4, counted for any width, number of key-value
heads and gate; where nothing is dropped out there are no masks. What no formula names (the context
of the driver, fragmentation, libraries' workspaces) is a line of its own, `unexplained`, with a
distribution learned from measurements (`calibration.py`). Bytes of one device.
"""

from dataclasses import dataclass, fields
from typing import Literal

from lascaux.model.accounting import count_parameters, expert_parameters, optimizer_state_bytes
from lascaux.parallel.accounting import held_parameters
from lascaux.parallel.layout import Layout
from lascaux.parallel.plan import stage_layers, stages_of
from lascaux.planner.job import Job

LOSS_LOGITS = 2**27
"""Lascaux makes so many logits at a time (kernels/cross_entropy.py)"""
GPU_CONTEXT_BYTES = 1.5e9
"""driver, kernels and collectives' buffers; 1 to 2 GB are usual"""
PROCESS_BYTES, DATA_BYTES, COMPILED_BYTES = 3.3e8, 1.3e8, 2.5e8
"""of a process with torch loaded; of what `train` has beside it, tokenizer, data and saving; of
products that oneDNN compiles for every number of rows an expert meets in the course of a run"""
PROCESSOR_PEAK, PROCESSOR_PEAK_MIXTURE = 1.5, 2.5
"""bytes of the heap over those that are kept for the backward pass, on a processor: what lives for
a moment and the holes it leaves; experts' pieces change size from step to step and leave more"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Bytes on one device, by what they are for; the kinds add up to `total`."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    recomputed: float
    """of the layer that is being recomputed"""
    logits: float
    buffers: float
    """gathered layers, collectives"""
    saving: float
    """on a processor, the copy of weights and optimizer from which a checkpoint is written"""
    context: float

    @property
    def total(self) -> float:
        """What the formulas know."""
        return sum(getattr(self, field.name) for field in fields(self))

    def by_kind(self) -> dict[str, float]:
        """Kind -> bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def worst_ledger(job: Job) -> tuple[int, Ledger]:
    """The pipeline process that needs most, and its bytes.

    It is the first, which has most micro-batches under way, the second where the first has dense
    layers alone, or the last, which has the head.
    """
    last = job.layout.pp - 1
    ledgers = [(i, stage_ledger(job, i)) for i in sorted({0, min(1, last), last})]
    return max(ledgers, key=lambda entry: entry[1].total)


def stage_ledger(job: Job, pp_index: int) -> Ledger:
    """Bytes on a device of one pipeline process."""
    states = state_bytes(job, pp_index)
    last = job.layout.pp - 1
    return Ledger(
        weights=states["weights"],
        gradients=states["gradients"],
        optimizer=states["optimizer"],
        activations=_activation_bytes(job, pp_index),
        recomputed=_recomputed_bytes(job),
        logits=_logit_bytes(job) if pp_index == last else 0.0,
        buffers=_buffer_bytes(job, pp_index),
        saving=_saving_bytes(job, states) if job.device.vendor == "CPU" else 0.0,
        context=context_bytes(job),
    )


def context_bytes(job: Job) -> float:
    """Of the process and its libraries before the first step, and of what they keep."""
    if job.device.vendor != "CPU":
        return GPU_CONTEXT_BYTES
    return PROCESS_BYTES + beside_bench_bytes(job)


def beside_bench_bytes(job: Job) -> float:
    """What a run on a processor holds that `lascaux bench` does not."""
    compiles = job.config.model.num_experts > 0 and job.precision == "bf16"
    return DATA_BYTES + COMPILED_BYTES * compiles


def state_bytes(job: Job, pp_index: int) -> dict[str, float]:
    """Weights, gradients and optimizer state: Lascaux keeps fp32 beside a copy in lower precision.

    Other stacks keep half-precision weights, fp32 gradients and, with the optimizer, an fp32 copy
    of the weights: 18 bytes a parameter, or 6 + 12 / d with a sharded optimizer.
    """
    model, layout = job.config.model, job.layout
    whole = held_parameters(
        model, Layout(pp=layout.pp, tp=layout.tp), job.config.parallel.virtual_pp, pp_index
    )
    experts = expert_parameters_held(job, pp_index)
    share = whole / job.weight_shards
    if job.weight_shards == 1:
        share -= experts * (1 - 1 / layout.ep)  # each expert-parallel process has some of them
    moments = optimizer_state_bytes(model, job.config.optimizer.name)
    moments_each = moments / count_parameters(model).total
    low = job.precision != "fp32"
    if job.stack == "lascaux":
        weights, gradients = 4 * share, 4 * share
        if layout.world_size == 1:
            weights, gradients = weights + 2 * low * whole, gradients + 2 * low * whole
        elif layout.pp > 1:  # a stage's weights stay gathered for all micro-batches of a step
            gathered = whole - experts * (1 - 1 / layout.ep)
            weights, gradients = weights + 2 * low * gathered, 4 * gathered
        return {
            "weights": weights,
            "gradients": gradients,
            "optimizer": moments_each * whole / job.optimizer_shards,
        }
    gradients = share if job.zero != 2 else whole / job.optimizer_shards
    copies = "deepspeed" in job.stack or (job.stack == "unknown" and job.zero > 0)
    step_gradients = 4 * copies  # DeepSpeed's optimizer copies its part to fp32
    optimizer = (moments_each + 4 * low + step_gradients) * whole / job.optimizer_shards
    return {
        "weights": (2 if low else 4) * share,
        "gradients": 4 * gradients,
        "optimizer": optimizer,
    }


def expert_parameters_held(job: Job, pp_index: int) -> float:
    """Of the experts, what tp and pp leave on a pipeline process, before ep divides it."""
    model, layout = job.config.model, job.layout
    if not model.num_experts:
        return 0.0
    virtual = job.config.parallel.virtual_pp
    ranges = stage_layers(model.num_layers, layout.pp * virtual)
    own = [i for stage in stages_of(pp_index, layout.pp, virtual) for i in ranges[stage]]
    mixtures = sum(model.is_mixture(layer) for layer in own)
    return mixtures * model.num_experts * expert_parameters(model, model.expert_width) / layout.tp


def layer_activation_bytes(
    job: Job, mixture: bool, kept: Literal["all", "selective", "full"]
) -> float:
    """Activations that one layer keeps of one micro-batch, on one device.

    Of a plain layer without dropout and fused attention: 32 bytes a token and unit of width; with
    dropout Korthikanti et al. count 34.
    """
    model, layout, e = job.config.model, job.layout, job.element_bytes
    h, tp = model.d_model, layout.tp
    spread = tp if job.sequence_parallel else 1
    if kept == "full":
        return job.microbatch_tokens * e * h / spread
    inner, kv = model.attention_width, model.kv_heads * model.head_width
    dropout = 0 if job.stack == "lascaux" else 2 * h  # masks after attention and feed-forward
    own = job.stack == "lascaux"
    norms = 1 if model.block == "parallel" else 2
    gathered = e * norms * h / (1 if own else spread)  # inputs of attention and of feed-forward,
    whole = e * norms * h + dropout  # which Lascaux keeps as tp gathered them; inputs of the norms
    split = e * (2 * inner + 2 * kv * (layout.cp if own else 1))  # and keys as cp gathered them
    if job.device.vendor == "CPU":
        split += e * (3 * inner + 2 * kv)  # attention lays out heads anew and keeps both
    if not job.fused_attention and kept != "selective":
        split += (2 * e + 1) * model.num_heads * job.config.train.seq_len
    gated = model.activation == "swiglu"
    inner_copies = 3 if gated else 2
    if mixture:
        width = model.experts_per_token * model.expert_width
        shared = model.num_shared_experts * model.expert_width
        split += e * (inner_copies * (width + shared))
        whole += e * 2 * model.experts_per_token * h + 8 * model.num_experts
    else:
        split += e * inner_copies * model.ffn_width
    return job.microbatch_tokens * (whole / spread + gathered + split / tp)


def _saving_bytes(job: Job, states: dict[str, float]) -> float:
    """fp32 weights and optimizer state once more, while they are written beside training.

    The checkpoint of the last step finds room that training has left.
    """
    checkpoint = job.config.checkpoint
    last_only = job.num_steps <= checkpoint.every_steps
    if job.stack != "lascaux" or last_only or not checkpoint.background:
        return 0.0
    copy = 2 if job.precision != "fp32" and job.layout.world_size == 1 else 0
    return states["weights"] * 4 / (4 + copy) + states["optimizer"]


def _activation_bytes(job: Job, pp_index: int) -> float:
    """Of the layers of a pipeline process, as many micro-batches as its schedule has under way."""
    model, layout = job.config.model, job.layout
    virtual = job.config.parallel.virtual_pp
    ranges = stage_layers(model.num_layers, layout.pp * virtual)
    layers = [i for stage in stages_of(pp_index, layout.pp, virtual) for i in ranges[stage]]
    kept: Literal["all", "selective", "full"] = "all" if job.recompute == "none" else job.recompute
    each = sum(layer_activation_bytes(job, model.is_mixture(i), kept) for i in layers)
    if job.device.vendor == "CPU":
        mixture = model.num_mixture_layers > 0
        each *= PROCESSOR_PEAK_MIXTURE if mixture else PROCESSOR_PEAK
    under_way = min(layout.pp - pp_index, job.num_microbatches)
    if virtual > 1:  # Narayanan et al. 2021, section 2.2, counted in stages
        most = 2 * (layout.pp - 1 - pp_index) + (virtual - 1) * layout.pp + 1
        under_way = min(job.num_microbatches * virtual, most) / virtual
    spread = layout.tp if job.sequence_parallel else 1
    embedded = job.element_bytes * job.microbatch_tokens * model.d_model / spread
    return under_way * (each + (embedded if pp_index == 0 else 0))


def _recomputed_bytes(job: Job) -> float:
    """Whole activations of one layer while it is recomputed."""
    if job.recompute != "full":
        return 0.0
    mixture = job.config.model.num_mixture_layers > 0
    return layer_activation_bytes(job, mixture, "all")


def _logit_bytes(job: Job) -> float:
    """Logits and their gradient: fp32 and half, of a piece of the tokens at a time in Lascaux."""
    logits = job.microbatch_tokens * job.config.model.vocab_rows / job.layout.tp
    if job.stack == "lascaux":
        logits = min(logits, LOSS_LOGITS)
    return logits * (4 + 2 * job.element_bytes)


def _buffer_bytes(job: Job, pp_index: int) -> float:
    """Sharded weights: two gathered layers, the whole gradient of one; else sums in pieces."""
    model, layout = job.config.model, job.layout
    if job.weight_shards == 1:
        return 4e8 if layout.world_size > 1 and job.device.vendor != "CPU" else 0.0
    count = count_parameters(model)
    body = count.attention + count.feed_forward + count.experts / layout.ep + count.router
    layer = body / model.num_layers
    if model.num_mixture_layers:
        expert = expert_parameters(model, model.expert_width) * model.num_experts / layout.ep
        layer = max(layer, count.attention / model.num_layers + expert)
    largest = layer / layout.tp
    ends = count.embedding + (count.head if layout.pp == 1 else 0)
    gathered = max(2 * largest, largest + ends / layout.tp * (pp_index in (0, layout.pp - 1)))
    return gathered * job.element_bytes + 4 * max(largest, ends / layout.tp)
