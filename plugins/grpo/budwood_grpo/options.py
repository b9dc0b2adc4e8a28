"""The options of grpo: a method, and the parts in which methods differ."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from budwood import InputError, Options, Reward, build_plugin

METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr-grpo": {"scale": "none", "aggregation": "constant"},
    "dapo": {"aggregation": "token", "clip_high": 0.28, "zero_variance": "drop", "resample": 3},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "rloo": {"baseline": "leave-one-out", "scale": "none", "ratio": "product", "kl_in": "reward"},
    "reinforce++": {"baseline": "none", "scale": "advantages", "aggregation": "token", "kl_in": "token-reward"},
}
"""What each method changes of `DEFAULTS`."""
DEFAULTS: dict[str, Any] = {
    "baseline": "group", "scale": "group", "ratio": "token", "aggregation": "sequence", "clip_low": 0.2,
    "clip_high": 0.2, "kl_in": "loss", "zero_variance": "keep", "resample": 0,
}  # fmt: skip
WEIGHT = "weight"


class GRPOOptions(Options):
    """Options of `grpo`. An option that is not set is that of the method."""

    rewards: list[dict[str, dict[str, Any]]] = Field(
        description="rewards by name, each with its options and a weight, such as {regex: {pattern: ok}}"
    )
    method: Literal["grpo", "dr-grpo", "dapo", "gspo", "rloo", "reinforce++"] = Field(
        "grpo", description="sets the options below that the recipe does not"
    )
    samples: int = Field(8, ge=1, description="answers sampled for each prompt")
    max_new_tokens: int = Field(256, ge=1, description="maximum tokens of an answer")
    temperature: float = Field(1.0, gt=0, le=100, description="of sampling, and of all log-probabilities")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most likely tokens with this share of the probability"
    )
    stop: list[str] = Field([], description="texts that end an answer")
    iterations: int = Field(1, ge=1, description="passes over each set of samples")
    minibatches: int = Field(1, ge=1, description="optimizer steps per pass, each on a part of the samples")
    baseline: Literal["group", "leave-one-out", "none"] | None = Field(
        None, description="subtracted from a reward: the mean of its prompt, that of the prompt's other samples, or 0"
    )
    scale: Literal["group", "batch", "advantages", "none"] | None = Field(
        None,
        description="divide by the rewards' standard deviation in the prompt or set; advantages: normalise these",
    )
    ratio: Literal["token", "sequence", "product"] | None = Field(
        None, description="probability ratio: of each token, the geometric mean over the answer, or the product"
    )
    aggregation: Literal["sequence", "token", "constant"] | None = Field(
        None, description="mean over answers of their token means, over all tokens, or sum / (answers · max_new_tokens)"
    )
    clip_low: float | None = Field(None, ge=0, lt=1, description="the ratio is clipped below 1 - clip_low")
    clip_high: float | None = Field(None, ge=0, description="the ratio is clipped above 1 + clip_high")
    kl: float = Field(0.0, ge=0, description="β, weight of the KL divergence from the reference; 0: no reference")
    kl_in: Literal["loss", "reward", "token-reward"] | None = Field(
        None, description="where the KL counts: a loss term, the answer's reward, or the return of each token"
    )
    reference: Literal["start", "base"] = Field(
        "start", description="the model at the start of the run, or its base without any adapter"
    )
    unbiased_kl: bool = Field(
        False, description="multiply the KL in the loss by the token's ratio, which makes its gradient unbiased"
    )
    zero_variance: Literal["keep", "drop"] | None = Field(
        None, description="prompts whose samples all have the same reward: their advantages are 0"
    )
    resample: int | None = Field(
        None, ge=0, description="rounds of new prompts in place of those that zero_variance: drop leaves out"
    )
    over_long: Literal["keep", "drop"] = Field("keep", description="answers that reach max_new_tokens")
    importance_cap: float | None = Field(
        None, gt=0, description="weight each token by trainer / sampler probability, at most this; default: no weight"
    )

    def value(self, name: str) -> Any:
        """Return an option, or the method's value if it is not set."""
        own = getattr(self, name)
        return METHODS[self.method].get(name, DEFAULTS[name]) if own is None else own

    def build_rewards(self) -> list[tuple[str, float, Reward]]:
        """Return label, weight and reward of each entry of `rewards`; labels are unique."""
        built: list[tuple[str, float, Reward]] = []
        for choice in self.rewards:
            for name, given in choice.items():
                options = {key: value for key, value in given.items() if key != WEIGHT}
                label = name.replace("-", "_")
                number = sum(other == label or other.startswith(f"{label}_") for other, _, _ in built)
                label += f"_{number + 1}" if number else ""
                built.append((label, given.get(WEIGHT, 1.0), build_plugin(name, Reward.group, options)))
        return built

    @model_validator(mode="before")
    @classmethod
    def _rewards(cls, data: Any) -> Any:
        """Validate the options of each reward, and write out their defaults."""
        given = data.get("rewards") if isinstance(data, dict) else None
        if given is None:
            return data
        entries = given if isinstance(given, list) else [given]
        if not entries:
            raise ValueError("rewards: name at least one, such as - exact-match")
        return {**data, "rewards": [_entry(entry, f"rewards[{number}]") for number, entry in enumerate(entries)]}

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty text would end every answer; remove it")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GRPOOptions:
        baseline, scale, where = self.value("baseline"), self.value("scale"), self.value("kl_in")
        if self.samples < 2 and (baseline != "none" or scale == "group"):
            what = f"baseline: {baseline}" if baseline != "none" else f"scale: {scale}"
            raise ValueError(
                f"samples: {self.samples} leaves nothing to compare with ({what}): raise it, or use reinforce++"
            )
        if self.resample and self.value("zero_variance") != "drop":
            raise ValueError("resample: replaces only prompts that are dropped: set zero_variance: drop, or remove it")
        if self.unbiased_kl and (self.kl == 0 or where != "loss"):
            raise ValueError("unbiased_kl: needs a kl above 0 in the loss (kl_in: loss); remove it")
        if self.minibatches > self.samples:
            raise ValueError(f"minibatches: {self.minibatches} is more than samples ({self.samples}); lower it")
        if self.kl == 0 and self.kl_in is not None:
            raise ValueError("kl_in: needs a kl above 0; set kl, or remove it")
        if self.kl == 0 and self.reference != "start":
            raise ValueError("reference: needs a kl above 0; set kl, or remove it")
        if where == "token-reward" and self.value("ratio") != "token":
            raise ValueError("kl_in: token-reward gives each token its own advantage, which needs ratio: token")
        if where == "token-reward" and scale not in ("advantages", "none"):
            raise ValueError(f"kl_in: token-reward needs scale: advantages or none, not {scale}")
        return self


def _entry(entry: Any, where: str) -> dict[str, dict[str, Any]]:
    """Return a reward with all of its options.

    Raises:
        ValueError: it is not a name with options, is not installed, or an option is wrong.
    """
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(f"{where}: write a reward's name, or its name with options, as - regex: {{pattern: yes}}")
    ((name, given),) = entry.items()
    path, _, function = str(name).partition(":")
    if path.endswith(".py"):
        raise ValueError(f"{where}: write a Python file as - file: {{path: {path}, function: {function or 'NAME'}}}")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"{where}: the options of {name} must be a mapping, not {given!r}")
    weight = given.get(WEIGHT, 1.0)
    valid = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight != 0
    if not valid:
        raise ValueError(f"{where}: weight must be a number other than 0, not {weight!r}")
    try:
        options = {key: value for key, value in given.items() if key != WEIGHT}
        reward = build_plugin(str(name), Reward.group, options)
    except InputError as error:
        raise ValueError(f"{where}: {error}") from error
    return {str(name): {**reward.options.model_dump(mode="json"), WEIGHT: float(weight)}}
