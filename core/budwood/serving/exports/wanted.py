"""What an export is to be, and what it became."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from budwood.errors import InputError, did_you_mean
from budwood.serving.exports import vllm
from budwood.serving.exports.replay import Replay
from budwood.serving.merge import DTYPES, MergeReport

PROGRAMS = {"peft": "PEFT", "vllm": "vLLM", "gguf": "llama.cpp", "ollama": "Ollama", "merged": "transformers"}
"""Targets, and the programs that they are for."""


@dataclass(frozen=True)
class Wanted:
    """What an export is to be.

    Attributes:
        target: peft, vllm, gguf, ollama or merged.
        as_type: adapter type to convert to; None: the adapter's own.
        rank: with as_type lora: the largest rank, of an approximation if need be.
        merged: gguf and ollama: the merged model instead of the adapter.
        with_base: gguf: also write the base.
        base: current location of the base; None: as recorded.
        quantization: of the base in the comparison; None: as recorded.
        dtype: of merged weights; None: see `merge`.
        max_lora_rank: vLLM's limit.
        check: load the export again and compare it on the base.
        force: accept an approximation or rounding that loses more than a quarter of the effect.
    """

    target: str
    as_type: str | None = None
    rank: int | None = None
    merged: bool = False
    with_base: bool = False
    base: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    device: str = "auto"
    max_lora_rank: int | None = None
    check: bool = True
    force: bool = False
    allow_other_base: bool = False

    @property
    def merges(self) -> bool:
        """Whether the adapter becomes part of a model's weights."""
        return self.merged or self.target == "merged"

    @property
    def merge_device(self) -> str:
        """Device of a merge: fp32 weights rarely fit on another one than the CPU."""
        return "cpu" if self.device == "auto" else self.device

    def validate(self) -> None:
        """Refuse an unknown target, and an option that it does not have.

        Raises:
            InputError: the message names the option.
        """
        if self.target not in PROGRAMS:
            raise InputError(
                f"--for {self.target}: no such target: choose one of {', '.join(PROGRAMS)}."
                f"{did_you_mean(self.target, PROGRAMS)}"
            )
        unused = {
            "--merged": self.merged and self.target not in ("gguf", "ollama"),
            "--with-base": self.with_base and (self.target != "gguf" or self.merged),
            "--as": self.as_type is not None and self.merges,
            "--max-lora-rank": self.max_lora_rank is not None and self.target != "vllm",
            "--dtype": self.dtype is not None and not self.merges,
            "--quantization": self.quantization is not None and (self.merges or not self.check),
            "--no-check": not self.check and self.merges,
        }
        if option := next((name for name, wrong in unused.items() if wrong), None):
            shown = f"{self.target} --merged" if self.merged and option != "--merged" else self.target
            raise InputError(f"{option}: has no effect with --for {shown}: leave it out.")
        if self.rank is not None and self.as_type != "lora":
            raise InputError("--rank: needs --as lora.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--rank {self.rank}: must be at least 1.")
        if self.as_type not in (None, "lora") and self.target != "peft":
            raise InputError(f"--as {self.as_type}: {PROGRAMS[self.target]} knows LoRA only: --as lora.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}.")
        vllm.check_limit(self.max_lora_rank)


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        directory: its folder.
        lines: what it holds, and the command that uses it.
        replay: the comparison; None: there was none.
        merged: the report of the merge, if the adapter was merged.
        approximate: whether it is the nearest adapter of a lower rank.
        notes: messages for the user.
    """

    directory: Path
    target: str
    lines: list[str]
    replay: Replay | None = None
    merged: MergeReport | None = None
    approximate: bool = False
    notes: list[str] = field(default_factory=list)
