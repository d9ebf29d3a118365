"""What the findings of a claim come to, in a sentence."""

import typing
from collections.abc import Sequence

from lascaux.planner.facts import read_facts
from lascaux.units import format_percent

if typing.TYPE_CHECKING:
    from lascaux.planner.claim_text import Finding

USUAL_UTILIZATION = "training-utilization-whole-run"
SENTENCES = {
    "impossible": "it cannot be as it is stated",
    "differs": "it contradicts itself",
    "unknown convention": "it holds together under another convention than it states",
}


def in_words(findings: "Sequence[Finding]") -> str:
    """Whether a claim holds together, and whether the speed of the whole run is an ordinary one."""
    verdicts = {each.verdict for each in findings}
    words = next(
        (sentence for verdict, sentence in SENTENCES.items() if verdict in verdicts),
        "nothing in it contradicts itself",
    )
    rate = next((each.recomputed for each in findings if each.quantity == "mfu_wall"), None)
    if rate is None or "impossible" in verdicts:
        return words
    usual = next(f for f in read_facts("diffusion")["fact"] if f["id"] == USUAL_UTILIZATION)
    low, high = usual["low"], usual["high"]
    place = "an ordinary" if low <= rate <= high else "an unusual"
    return (
        f"{words}; {format_percent(rate)} of the peak over the whole run is {place} figure: nine "
        f"of ten language models reached {100 * low:g} to {100 * high:g} %"
    )
