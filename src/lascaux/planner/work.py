"""Seconds of one optimizer step from its parts: products, traffic of memory, links, pipeline.

Every part is physics with few constants, `Constants`, which are fitted to published runs
(`calibration.py`). Legend: t, p, d sizes of tp, pp and data parallelism; b micro-batch tokens; h
width; what a device does is counted for the slowest pipeline stage.
"""

from dataclasses import dataclass

from lascaux.parallel.accounting import held_parameters
from lascaux.parallel.layout import Layout
from lascaux.parallel.plan import stage_layers, stages_of
from lascaux.planner.job import Job
from lascaux.planner.memory import expert_parameters_held, layer_activation_bytes

HALF_SPEED_SIDE = 128
"""a product of this side reaches half of the rate of a large one"""
TILE = 64
"""sides of matrix products that are no multiple of this leave processors idle"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """What is fitted; each is one number for all devices and stacks."""

    product_share: float = 0.92
    """of the best rate anyone reached, in large products"""
    traffic_passes: float = 3.0
    """times the activations of a layer cross the memory bus, forward and backward"""
    link_share: float = 0.75
    """of a link's rate that a collective reaches"""
    networks_share: float = 0.3
    """of the other network cards of its node that a device's collective uses"""
    exposed_share: float = 0.5
    """of the sum of gradients over data parallelism, what nothing hides"""
    gather_share: float = 0.25
    """of the gathering of sharded weights, what computation beside it does not hide"""
    tile_penalty: float = 0.25
    """longer time of products whose sides are no multiples of a tile"""
    seconds_per_layer: float = 1.5e-4
    """starting the kernels of a layer, forward and backward, for each micro-batch"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSeconds:
    """Where a step's time goes, seconds; the parts add up."""

    products: float
    memory_traffic: float
    tensor_parallel: float
    expert_parallel: float
    context_parallel: float
    pipeline_bubble: float
    data_parallel: float
    optimizer: float
    launches: float

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, name) for name in self.__slots__)


def step_seconds(job: Job, constants: Constants) -> StepSeconds:
    """The parts of one optimizer step, of the slowest pipeline stage."""
    layout, virtual = job.layout, job.config.parallel.virtual_pp
    microbatches = job.num_microbatches
    products, traffic, tensor, experts, context, launches = _slowest_stage(job, constants)
    each = products + traffic + tensor + experts + context + launches
    bubble = each * (layout.pp - 1) / virtual
    bubble += microbatches * _boundary_seconds(job, constants) if layout.pp > 1 else 0.0
    compute = microbatches * (products + traffic)
    return StepSeconds(
        products=microbatches * products,
        memory_traffic=microbatches * traffic,
        tensor_parallel=microbatches * tensor,
        expert_parallel=microbatches * experts,
        context_parallel=microbatches * context,
        pipeline_bubble=bubble,
        data_parallel=_data_parallel_seconds(job, constants, compute),
        optimizer=_optimizer_seconds(job),
        launches=microbatches * launches,
    )


def _slowest_stage(job: Job, constants: Constants) -> tuple[float, ...]:
    """One micro-batch, forward and backward, through the layers of a pipeline process."""
    model, layout = job.config.model, job.layout
    virtual = job.config.parallel.virtual_pp
    ranges = stage_layers(model.num_layers, layout.pp * virtual)
    kinds: set[tuple[int, int, bool]] = set()
    for pp_index in range(layout.pp):
        stages = stages_of(pp_index, layout.pp, virtual)
        layers = [layer for stage in stages for layer in ranges[stage]]
        mixtures = sum(model.is_mixture(layer) for layer in layers) if model.num_experts else 0
        kinds.add((len(layers) - mixtures, mixtures, pp_index == layout.pp - 1))
    dense_products = _layer_product_seconds(job, constants, mixture=False)
    mixture_products = _layer_product_seconds(job, constants, True) if model.num_experts else 0.0
    dense_bytes = layer_activation_bytes(job, False, kept="all")
    mixture_bytes = layer_activation_bytes(job, True, kept="all") if model.num_experts else 0.0
    mixture_bytes += (
        4
        * model.experts_per_token
        * model.d_model
        * (job.microbatch_tokens * job.element_bytes * (model.num_experts > 0))
    )  # rows gathered to their experts and back, forward and backward
    head = _product_seconds(
        job, constants, job.microbatch_tokens, model.d_model, model.vocab_rows / layout.tp
    )
    passes = constants.traffic_passes * (4 / 3 if job.recompute == "full" else 1)
    bandwidth = job.device.bandwidth_bytes_per_second
    tensor = _tensor_parallel_seconds(job, constants)
    experts = _expert_parallel_seconds(job, constants) if model.num_experts else 0.0
    context = _context_parallel_seconds(job, constants)
    start = constants.seconds_per_layer
    found = [
        (
            dense * dense_products + mixtures * mixture_products + last * head,
            passes * (dense * dense_bytes + mixtures * mixture_bytes) / bandwidth,
            (dense + mixtures) * tensor,
            mixtures * experts,
            (dense + mixtures) * context,
            (dense + mixtures) * start,
        )
        for dense, mixtures, last in kinds
    ]
    return max(found, key=sum)


def _layer_product_seconds(job: Job, constants: Constants, mixture: bool) -> float:
    """Products of a layer, forward and backward, recomputation included."""
    model, layout, tokens = job.config.model, job.layout, job.microbatch_tokens
    tp, h = layout.tp, model.d_model
    inner, kv = model.attention_width / tp, model.kv_heads * model.head_width / tp
    attention = _product_seconds(job, constants, tokens, h, inner + 2 * kv)
    attention += _product_seconds(job, constants, tokens, inner, h)
    core = _attention_core_seconds(job, constants)
    matrices = 3 if model.activation == "swiglu" else 2
    if mixture:
        width = model.expert_width / tp
        rows = tokens * model.experts_per_token / model.num_experts * layout.ep
        held = model.num_experts / layout.ep
        ffn = held * _product_seconds(job, constants, rows, h, (matrices - 1) * width)
        ffn += held * _product_seconds(job, constants, rows, width, h)
        shared = model.num_shared_experts * width
        if shared:
            ffn += _product_seconds(job, constants, tokens, h, (matrices - 1) * shared)
            ffn += _product_seconds(job, constants, tokens, shared, h)
    else:
        width = model.ffn_width / tp
        ffn = _product_seconds(job, constants, tokens, h, (matrices - 1) * width)
        ffn += _product_seconds(job, constants, tokens, width, h)
    again = {"none": 0.0, "selective": core / 3, "full": (attention + core + ffn) / 3}
    return attention + core + ffn + again[job.recompute]


def _product_seconds(job: Job, constants: Constants, rows: float, k: float, n: float) -> float:
    """A product (rows x k)(k x n) and its two gradients: work, and what memory must move."""
    rate = constants.product_share * job.device.reachable(job.precision)
    work = 6 * rows * k * n / rate
    if any(side % TILE for side in (k, n)):
        work *= 1 + constants.tile_penalty
    moved = 3 * job.element_bytes * (rows * k + k * n + rows * n)
    return work + moved / job.device.bandwidth_bytes_per_second


def _attention_core_seconds(job: Job, constants: Constants) -> float:
    """Scores and weighted sums; a fused kernel leaves out what the causal mask hides."""
    model, layout = job.config.model, job.layout
    flops = 12 * job.microbatch_tokens * job.config.train.seq_len * model.attention_width
    rate = constants.product_share * job.device.reachable(job.precision) * layout.tp
    share = 0.5 if job.fused_attention else 1.0
    slow = 1.5 if model.head_width % 8 == 0 else 4.0
    return share * slow * flops / rate


def _ring_seconds(num_bytes: float, number: int, rate: float) -> float:
    """All-gather or reduce-scatter of a tensor of this size over a ring."""
    return num_bytes * (number - 1) / number / rate if number > 1 else 0.0


def _link(job: Job, constants: Constants, number: int, inside: int) -> float:
    """Bytes per second between `number` devices, of which each stands for `inside` neighbours."""
    device = job.device
    if number * inside <= device.devices_per_node:
        return constants.link_share * device.link_bytes_per_second
    beside = min(number, device.devices_per_node // inside) - 1 if inside else 0
    rate = device.network_bytes_per_second * (1 + constants.networks_share * max(0, beside))
    return constants.link_share * min(rate, device.link_bytes_per_second)


def _tensor_parallel_seconds(job: Job, constants: Constants) -> float:
    """Of a layer: an all-reduce after attention and feed-forward, forward and backward.

    With sequence parallelism each is a reduce-scatter and an all-gather, of the same volume.
    """
    tp = job.layout.tp
    sums = 1 if job.config.model.block == "parallel" else 2
    passes = 3 if job.recompute == "full" else 2
    num_bytes = job.element_bytes * job.microbatch_tokens * job.config.model.d_model
    return passes * sums * 2 * _ring_seconds(num_bytes, tp, _link(job, constants, tp, 1))


def _expert_parallel_seconds(job: Job, constants: Constants) -> float:
    """Of a layer: rows to their experts and back, forward and backward."""
    model, layout = job.config.model, job.layout
    rows = job.microbatch_tokens * model.experts_per_token
    num_bytes = job.element_bytes * rows * model.d_model / layout.tp
    rate = _link(job, constants, layout.ep, layout.tp)
    return 4 * _ring_seconds(num_bytes, layout.ep, rate)


def _context_parallel_seconds(job: Job, constants: Constants) -> float:
    """Of a layer: keys and values gathered, their gradients summed."""
    model, layout = job.config.model, job.layout
    width = 2 * model.kv_heads * model.head_width / layout.tp
    num_bytes = job.element_bytes * job.microbatch_tokens * layout.cp * width
    rate = _link(job, constants, layout.cp, layout.tp)
    return 2 * _ring_seconds(num_bytes, layout.cp, rate)


def _boundary_seconds(job: Job, constants: Constants) -> float:
    """Activations to the next stage and gradients back, for one micro-batch."""
    layout, virtual = job.layout, job.config.parallel.virtual_pp
    num_bytes = job.element_bytes * job.microbatch_tokens * job.config.model.d_model
    num_bytes /= layout.tp if job.sequence_parallel else 1
    inside = layout.tp * layout.data_parallel * layout.cp
    return 2 * virtual * num_bytes / _link(job, constants, 2, inside)


def device_parameters(job: Job, shards: int = 1) -> float:
    """Parameters that tp and pp leave on the fullest pipeline process, divided by `shards`."""
    model, layout = job.config.model, job.layout
    whole = Layout(pp=layout.pp, tp=layout.tp)
    virtual = job.config.parallel.virtual_pp
    stages = {0, min(1, layout.pp - 1), layout.pp - 1}
    return max(held_parameters(model, whole, virtual, i) for i in stages) / shards


def _data_parallel_seconds(job: Job, constants: Constants, compute: float) -> float:
    """What the sum of gradients, and under FSDP the gathering of weights, adds to the step.

    Sharded weights travel for each micro-batch beside its computation; what is longer counts.
    """
    layout = job.layout
    shards, replicas = layout.weight_shards, layout.dp_replicate
    parameters = device_parameters(job)
    seconds = 0.0
    if shards > 1:
        rate = _link(job, constants, shards, layout.tp)
        experts = expert_parameters_held(job, layout.pp - 1)
        once = _ring_seconds(job.element_bytes * (parameters - experts), shards, rate)
        share = shards // layout.ep  # of the processes that hold the same experts
        once += _ring_seconds(job.element_bytes * experts / layout.ep, share, rate)
        if job.zero == 3:
            summed = 4 / job.element_bytes if job.stack == "lascaux" else 1  # gradients in fp32
            times = 1 if layout.pp > 1 and job.stack == "lascaux" else job.num_microbatches
            beside = (2 + summed) * times * once
            seconds += max(0.0, beside - compute)
            seconds += constants.gather_share * min(beside, compute)
        else:
            seconds += constants.exposed_share * 2 * once * 4 / job.element_bytes
    if replicas > 1:
        rate = _link(job, constants, replicas, layout.tp * shards)
        share = parameters / job.weight_shards
        seconds += constants.exposed_share * 2 * _ring_seconds(4 * share, replicas, rate)
    return seconds


def _optimizer_seconds(job: Job) -> float:
    """Reading gradients, weights and state and writing them back, fp32; Muon's products too."""
    share = device_parameters(job, job.optimizer_shards)
    seconds = 7 * 4 * share / job.device.bandwidth_bytes_per_second
    if job.config.optimizer.name == "muon":
        whole = device_parameters(job)
        seconds += _muon_flops(job) * share / whole / job.device.reachable(job.precision)
    return seconds


def _muon_flops(job: Job) -> float:
    """Newton-Schulz on the matrices of a pipeline process: 4 m^2 n + 2 m^3 an iteration, m <= n."""
    model, layout = job.config.model, job.layout
    h, inner = model.d_model, model.attention_width
    kv = model.kv_heads * model.head_width
    sides = [(h, inner), (h, kv), (h, kv), (h, inner)]
    up = 3 if model.activation == "swiglu" else 2
    dense = up * [(h, model.ffn_width)]
    mixture = up * [(h, model.expert_width)] * (model.num_experts + model.num_shared_experts)
    iterations = job.config.optimizer.muon_newton_schulz_steps or 5
    mixtures = model.num_mixture_layers
    per_layer = sum(_newton_schulz_flops(m, n) for m, n in sides) * model.num_layers
    per_layer += sum(_newton_schulz_flops(m, n) for m, n in dense) * (model.num_layers - mixtures)
    per_layer += sum(_newton_schulz_flops(m, n) for m, n in mixture) * mixtures
    return iterations * per_layer / (layout.pp * layout.tp)


def _newton_schulz_flops(m: int, n: int) -> float:
    """Work, as long as that of a large product: small ones take longer for theirs."""
    small, large = min(m, n), max(m, n)
    return (4 * small**2 * large + 2 * small**3) * (1 + HALF_SPEED_SIDE / small)
