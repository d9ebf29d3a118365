"""From checked fields to what the engine is asked: completions, conversations, embeddings."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lascaux.generate.request import Request, Sampling
from lascaux.serve.chat import write_conversation
from lascaux.serve.fields import (
    Body,
    Fields,
    check_ids,
    check_value,
    read_bias,
    read_fields,
    read_stops,
    row_of,
)
from lascaux.serve.limits import Route
from lascaux.serve.prompts import Prompt, check_length, read_prompts
from lascaux.serve.refusals import Refusal, shown
from lascaux.serve.served import Served

NEW_SEEDS, SEEDS = 1 << 32, 1 << 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What one request asks for: every answer's request, and how the answers are written."""

    kind: Literal["completions", "chat"]
    requests: tuple[Request, ...]
    """`n` for each prompt, prompt after prompt"""
    n: int
    seed: int
    stream: bool
    include_usage: bool
    logprobs: bool
    echo: bool
    return_token_ids: bool


def completion_call(body: Body, served: Served) -> Call:
    """What a body to /v1/completions asks for. Raises: Refusal."""
    fields = read_fields(body, "completions")
    served.check_model(fields["model"])
    top, vocab_size = fields["logprobs"], served.tokenizer.vocab_size
    top = None if top is None else vocab_size if top == -1 else min(top, vocab_size)
    if fields["max_tokens"] == 0 and not fields["echo"]:
        raise Refusal(
            "'max_tokens' 0 draws nothing; with \"echo\": true the prompt is scored",
            field="max_tokens",
        )
    most_tokens = fields["truncate_prompt_tokens"]
    prompts = read_prompts(
        body,
        "prompt",
        served,
        begin=fields["add_special_tokens"],
        any_length=most_tokens is not None,
    )
    if most_tokens is not None:
        prompts = [Prompt(prompt.place, prompt.ids[-most_tokens:]) for prompt in prompts]
    return _call("completions", body, fields, prompts, served, top=top, stops=())


def chat_call(body: Body, served: Served) -> Call:
    """What a body to /v1/chat/completions asks for. Raises: Refusal."""
    fields = read_fields(body, "chat")
    served.check_model(fields["model"])
    top = min(fields["top_logprobs"] or 0, served.tokenizer.vocab_size)
    if fields["top_logprobs"] and not fields["logprobs"]:
        raise Refusal("'top_logprobs' needs \"logprobs\": true", field="top_logprobs")
    if fields["max_completion_tokens"] is not None:
        fields["max_tokens"] = fields["max_completion_tokens"]
    prompt, stops = write_conversation(body.get("messages"), served)
    top_or_none = top if fields["logprobs"] else None
    return _call("chat", body, fields, [prompt], served, top=top_or_none, stops=stops)


def embedding_call(body: Body, served: Served) -> tuple[list[Request], str]:
    """The requests of a body to /v1/embeddings, and how vectors are written. Raises: Refusal."""
    fields = read_fields(body, "embeddings")
    served.check_model(fields["model"])
    form = fields["encoding_format"]
    if form not in ("float", "base64"):
        raise Refusal(
            f"'encoding_format' must be float or base64; got {shown(form)}", field="encoding_format"
        )
    prompts = read_prompts(body, "input", served, begin=True)
    for prompt in prompts:
        check_length(prompt, served, draws=False)
    sampling = Sampling(max_tokens=0)
    return [Request(prompt=prompt.ids, sampling=sampling, embed=True) for prompt in prompts], form


def _call(
    route: Literal["completions", "chat"],
    body: Body,
    fields: Fields,
    prompts: list[Prompt],
    served: Served,
    *,
    top: int | None,
    stops: tuple[str, ...],
) -> Call:
    echo, n = bool(fields.get("echo")), fields["n"]
    if body.get("best_of") not in (None, n):
        raise Refusal(
            f"'best_of' must equal 'n' ({n}); got {shown(body['best_of'])}", field="best_of"
        )
    seed = secrets.randbelow(NEW_SEEDS) if fields["seed"] is None else fields["seed"]
    for prompt in prompts:
        check_length(prompt, served, draws=fields["max_tokens"] != 0)
    if len(prompts) * n > served.most_answers:
        raise Refusal(
            f"'n' {n} for {len(prompts)} prompts asks for {len(prompts) * n} answers; at most "
            f"{served.most_answers} can be asked for at once",
            field="n",
        )
    sampling = _sampling(fields, body, served, route, seed=seed, stops=stops)
    requests = tuple(
        Request(
            prompt=prompt.ids,
            sampling=sampling[choice],
            top_logprobs=top,
            score_prompt=echo and top is not None,
        )
        for prompt in prompts
        for choice in range(n)
    )
    _check_entries(requests, served, "top_logprobs" if route == "chat" else "logprobs")
    return Call(
        kind=route,
        requests=requests,
        n=n,
        seed=seed,
        stream=fields["stream"],
        include_usage=_include_usage(fields, route),
        logprobs=top is not None,
        echo=echo,
        return_token_ids=fields["return_token_ids"],
    )


def _sampling(
    fields: Fields, body: Body, served: Served, route: Route, *, seed: int, stops: tuple[str, ...]
) -> list[Sampling]:
    """How each of the `n` answers to a prompt is drawn."""
    vocab_size = served.tokenizer.vocab_size
    bias: Mapping[str, Any] = fields["logit_bias"] or {}
    given: dict[str, Any] = {
        name: fields[name]
        for name in (
            "max_tokens",
            "min_tokens",
            "temperature",
            "top_p",
            "min_p",
            "typical_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
    }
    return [
        Sampling(
            **given,
            top_k=max(0, fields["top_k"]),
            logit_bias=read_bias(dict(bias), route, vocab_size),
            seed=seed % SEEDS,
            choice=choice,
            stop=read_stops(fields["stop"], route) + stops,
            include_stop=fields["include_stop_str_in_output"],
            stop_token_ids=check_ids(fields["stop_token_ids"] or [], "stop_token_ids", vocab_size),
            ignore_end_of_text=fields["ignore_eos"],
        )
        for choice in range(fields["n"])
    ]


def _check_entries(requests: tuple[Request, ...], served: Served, name: str) -> None:
    """Raise Refusal (400) for more log-probabilities than one answer should hold in memory."""
    entries = 0
    for request in requests:
        if request.top_logprobs is None:
            return
        room = served.max_context - len(request.prompt)
        drawn = request.sampling.max_tokens
        tokens = room if drawn is None else min(drawn, room)
        tokens += len(request.prompt) if request.score_prompt else 0
        entries += tokens * (request.top_logprobs + 1)
    if entries > served.limits.logprob_entries:
        raise Refusal(
            f"'{name}' asks for up to {entries:,} log-probabilities in one request; at most "
            f"{served.limits.logprob_entries:,}; ask for fewer, or for fewer tokens",
            field=name,
        )


def _include_usage(fields: Fields, route: Route) -> bool:
    options = fields["stream_options"]
    if options is None:
        return False
    if not fields["stream"]:
        raise Refusal("'stream_options' needs \"stream\": true", field="stream_options")
    value = options.get("include_usage")
    row = row_of(route, "stream_options.include_usage")
    return False if value is None else check_value(value, row)
