"""The learning rate over the steps, as a fraction of its peak."""

import math

from lascaux.config.schema import ScheduleConfig

DEFAULT_DECAY_FRACTION = 0.2
DEFAULT_FINAL_LR_FRACTION = 0.1


def lr_fraction(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Fraction of the peak learning rate for the update that makes step `step` (1-based).

    The warm-up rises in a straight line and reaches 1 at its last step; the decay reaches
    `final_lr_fraction` at the last step of the run. Cosine: Loshchilov & Hutter 2017, one half
    period. WSD: Hu et al. 2024, with a straight decay.
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        return step / warmup
    if schedule.name == "constant":
        return 1.0
    final = schedule.final_lr_fraction
    final = DEFAULT_FINAL_LR_FRACTION if final is None else final
    if schedule.name == "cosine":
        progress = (step - warmup) / (num_steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = schedule.decay_fraction
    decay = DEFAULT_DECAY_FRACTION if decay is None else decay
    decay_steps = min(num_steps - warmup, round(decay * num_steps))
    steps_left = num_steps - step
    if steps_left >= decay_steps:
        return 1.0
    return final + (1 - final) * steps_left / decay_steps
