"""The fields of requests: those of OpenAI's API that the server carries out, and its own. No other is ignored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from budwood.errors import did_you_mean
from budwood.serving.http.errors import ApiError
from budwood.serving.http.settings import Limits

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Weight = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]

INERT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that describe a request to its sender, and that no answer depends on in OpenAI's API either."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "function_call": ("auto", "none"),
    "functions": ([],), "logit_bias": ({},), "modalities": (["text"],), "moderation": (),
    "parallel_tool_calls": (True,), "prediction": (), "presence_penalty": (0,), "prompt_cache_options": (),
    "prompt_cache_retention": (), "reasoning_effort": (), "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"), "store": (False,), "suffix": ("",), "verbosity": (), "web_search_options": (),
}  # fmt: skip
"""Fields that the server does not carry out, with the values, beside null, at which there is nothing to carry out."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream has beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(_Body):
    """What requests for text have in common; null stands for the default."""

    model: str = Field(min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    adapters: dict[str, Weight] | None = Field(None, min_length=1, max_length=8)
    """Weights of several adapters, whose sum answers; `model` is the base then."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def log_probs(self) -> int | None:
        """How many most probable tokens to return with the log-probability of each token; None: neither."""
        raise NotImplementedError

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Function(_Body):
    """A tool's definition."""

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class Chat(Generation):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def log_probs(self) -> int | None:
        """See `Generation`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Generation):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def log_probs(self) -> int | None:
        """See `Generation`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class Embedding(_Body):
    """A request to /v1/embeddings."""

    model: str = Field(min_length=1, max_length=256)
    input: str | list[str] | list[Token] | list[list[Token]]
    encoding_format: Literal["float", "base64"] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each input: a text, or token ids."""
        if isinstance(self.input, str) or self.input and isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)  # type: ignore[arg-type]


Body = TypeVar("Body", bound=BaseModel)


def read(kind: type[Body], values: dict[str, Any]) -> Body:
    """Return a request's fields.

    Raises:
        ApiError: one is unknown, not carried out by the server, of another type or out of range; the message names it.
    """
    known = {key: value for key, value in values.items() if key in kind.model_fields or not _is_inert(key, value)}
    unknown = [key for key in known if key not in kind.model_fields]
    if unknown:
        raise _refused(unknown, kind.model_fields)
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _invalid(error) from error


def check(body: Generation, limits: Limits) -> None:
    """Check a request against the server's limits.

    Raises:
        ApiError: the message names the field and the limit.
    """
    asked = [("max_tokens", body.max_tokens, limits.max_tokens), ("n", body.n, limits.n)]
    stops = body.stops
    asked.append(("stop", len(stops), limits.stop))
    if isinstance(body, Chat):
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ: send one.", param="max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true.", param="top_logprobs")
        asked += [
            ("max_completion_tokens", body.max_completion_tokens, limits.max_tokens),
            ("messages", len(body.messages), limits.messages),
            ("tools", len(body.tools or ()), limits.tools),
        ]
    if isinstance(body, Completion):
        asked.append(("prompt", len(body.prompts), limits.prompts))
        if not body.prompts:
            raise ApiError(400, "prompt: is empty.", param="prompt")
        if len(body.prompts) * (body.n or 1) > limits.rows:
            raise ApiError(400, f"prompt: {limits.rows} answers are the most of a request.", param="prompt")
    for name, value, limit in asked:
        if value is not None and value > limit:
            raise ApiError(400, f"{name}: {value:,} is more than this server's limit of {limit:,}.", param=name)
    if any(not stop or len(stop) > limits.stop_length for stop in stops):
        raise ApiError(400, f"stop: each must have 1 to {limits.stop_length} characters.", param="stop")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream: true.", param="stream_options")


def _is_inert(key: str, value: Any) -> bool:
    """Return whether a field that the server does not carry out asks for nothing."""
    if key in INERT:
        return True
    if key not in NEUTRAL:
        return False
    return value is None or any(value == other and isinstance(value, bool) == isinstance(other, bool)
                                for other in NEUTRAL[key])  # fmt: skip


def _refused(unknown: list[str], fields: Iterable[str]) -> ApiError:
    parts = []
    for key in unknown[:8]:
        if key in NEUTRAL:
            neutral = " or ".join(["leave it out", *(f"send {value!r}" for value in NEUTRAL[key][:1])])
            parts.append(f"{key}: is not supported by this server; {neutral}.")
        else:
            parts.append(f"{key[:64]}: is no field of this request.{did_you_mean(key, fields)}")
    return ApiError(400, " ".join(parts), code="unsupported_parameter", param=unknown[0][:64])


def _invalid(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_input=False)
    first = max(problems, key=lambda problem: len(problem["loc"]) if problem["type"] == "extra_forbidden" else 0)
    where = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    text = {"missing": "is missing", "extra_forbidden": "is no field here"}.get(first["type"], first["msg"])
    alike = [
        p for p in problems if p["loc"][:1] == first["loc"][:1] and p["type"] not in ("missing", "extra_forbidden")
    ]
    if len(alike) > 1 and first in alike:  # branches of a union
        text = "; or ".join(dict.fromkeys(str(problem["msg"]) for problem in alike[:4]))
    return ApiError(400, f"{where}: {text}.", param=str(first["loc"][0]))


def _is_branch(part: object) -> bool:
    """Return whether a part of a location is pydantic's name of a branch of a union, not the request's."""
    return isinstance(part, str) and (part in ("str", "int") or part.startswith(("list[", "constrained-")))
