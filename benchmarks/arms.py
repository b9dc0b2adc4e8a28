"""The arms: each trains the workload in a separate process, a few optimizer steps at a time on request."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

from benchmarks import workload as w
from benchmarks.workload import Workload
from budwood import Strategy, hookimpl

if TYPE_CHECKING:
    from budwood import Event, Run


@dataclass
class Pace:
    """Pauses an arm between its turns. `connection` receives a number of steps, and sends timings and losses."""

    connection: Connection
    left: int = 0
    started: float = 0.0
    started_processor: float = 0.0
    losses: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    """What the arm chose by itself."""

    def ready(self) -> None:
        """Report that the arm is ready for its first step; return when its first turn starts."""
        self.connection.send({"peak": _peak_bytes(), "notes": self.notes})
        self._wait()

    def stepped(self, loss: float) -> None:
        """Record a finished optimizer step; after the last of a turn, return when the next turn starts."""
        self.losses.append(loss)
        self.left -= 1
        if self.left == 0:
            _synchronize()
            seconds = time.perf_counter() - self.started
            processor = time.process_time() - self.started_processor
            report = {"seconds": seconds, "processor": processor, "losses": self.losses, "peak": _peak_bytes()}
            self.connection.send(report)
            self._wait()

    def _wait(self) -> None:
        self.left = self.connection.recv()
        if self.left == 0:
            raise SystemExit(0)  # final checks and saving are not measured
        self.losses = []
        _synchronize()
        self.started, self.started_processor = time.perf_counter(), time.process_time()


def _peak_bytes() -> int:
    """Return the peak of CUDA's allocator, or of the process without a GPU."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def work(name: str, workload: Workload, steps: int, threads: int, log: Path, connection: Connection) -> None:
    """Entry point of an arm's process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(threads)
    ARMS[name](workload, steps, Pace(connection))


def budwood(workload: Workload, steps: int, pace: Pace, **options: Any) -> None:
    """Run `budwood.tune` on a recipe, with an additional strategy that pauses between turns.

    Args:
        options: further fields of the recipe's `train`.
    """
    import budwood
    from budwood.recipe.schema import Recipe

    PaceStrategy.pace = pace
    folder = workload.folder / "-".join(["budwood", *options])  # of this arm alone
    install_strategy(folder, "pace", "benchmarks.arms:PaceStrategy")
    recipe = {
        "base": {"model": str(workload.base), "quantization": workload.size.quantization},
        "data": {"train": str(workload.data), "eval": "none", "max_length": w.MAX_LENGTH},
        "strategies": [{"lora": {"rank": w.RANK, "alpha": w.ALPHA, "targets": "all-linear"}}, "pace"],
        "train": {
            "steps": steps,
            "batch_examples": workload.examples,
            "micro_tokens": WHOLE if workload.size.whole_steps else 2048,
            "learning_rate": w.LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0,
            "clip": w.CLIP,
            "precision": workload.precision,
            "gradient_checkpointing": workload.size.gradient_checkpointing,
            "seed": w.SEED,
            **options,
        },
        "output": str(folder / "run"),
    }
    budwood.tune(Recipe.from_dict(recipe), planner=plan_for_card if "auto" in options.values() else None)


def plan_for_card(run: Run, skeleton: Any) -> None:
    """Plan a run as on a card of `CARD` bytes, if the GPU has more."""
    from budwood.planning import admission

    free = min(admission.available(run), CARD)
    with mock.patch.object(admission, "available", return_value=free):
        admission.admit(run, skeleton)


class PaceStrategy(Strategy):
    """Returns control to the benchmark after each turn."""

    pace: ClassVar[Pace]

    @hookimpl
    def prepare_model(self, model: Any, run: Run) -> Any:
        """Refuse to measure padded rows."""
        if not run.packed:
            raise SystemExit("the rows are not packed: see the output of the run")
        self.pace.notes = {"gradient_checkpointing": run.recipe.train.gradient_checkpointing}
        return model

    @hookimpl
    def on_event(self, event: Event) -> None:
        """Pause before the first step and after each turn."""
        if event.kind == "start":
            self.pace.ready()
        elif event.kind == "step":
            self.pace.stepped(float(event.values["loss"]))


def install_strategy(folder: Path, name: str, target: str) -> None:
    """Register a strategy like an installed package, with an entry point of a distribution on sys.path."""
    package = folder / "installed" / "budwood_benchmarks-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: budwood-benchmarks\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[budwood]\n{name} = {target}\n")
    sys.path.append(str(package.parent))


def trainer(rows: int) -> Callable[[Workload, int, Pace], None]:
    """The transformers Trainer on a PEFT model, with `rows` padded rows per micro-batch."""

    def run(workload: Workload, steps: int, pace: Pace) -> None:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        arguments = TrainingArguments(**_arguments(workload, steps, rows))
        tokenizer = _tokenizer(workload)
        Trainer(
            model=_peft_model(workload),
            args=arguments,
            train_dataset=_dataset(workload),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),  # pads input_ids, and labels with -100
            callbacks=[_pacer(pace)],
        ).train()

    return run


def sft(packed: bool, load: Callable[[Workload], Any] | None = None) -> Callable[[Workload, int, Pace], None]:
    """TRL's SFTTrainer, with its defaults or with packed rows, on a PEFT model or on what `load` returns.

    With packing, an optimizer step is four rows of at most 1024 tokens with the examples of that step only, so that the
    losses of the arms agree; TRL's packing would distribute them over steps.
    """

    def run(workload: Workload, steps: int, pace: Pace) -> None:
        model = (load or _peft_model)(workload)  # first: Unsloth changes TRL when it is imported
        from trl import SFTConfig, SFTTrainer

        packed_rows = PACKED_ROWS if workload.size.whole_steps else 1
        rows = packed_rows if packed else 8
        micro_steps = (PACKED_ROWS if packed else workload.examples) // rows
        config = SFTConfig(
            **_arguments(workload, steps, rows) | {"gradient_accumulation_steps": micro_steps},
            max_length=None,
            padding_free=packed,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        SFTTrainer(
            model=model,
            args=config,
            train_dataset=_packed_dataset(workload) if packed else _dataset(workload),
            processing_class=_tokenizer(workload),
            callbacks=[_pacer(pace)],
        ).train()

    return run


def _unsloth_model(workload: Workload) -> Any:
    """Unsloth's own model with its adapter, which recomputes layers in Unsloth's way."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(workload.base), max_seq_length=WHOLE, load_in_4bit=workload.size.quantization != "none"
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model, r=w.RANK, lora_alpha=w.ALPHA, lora_dropout=0, bias="none", target_modules=names, random_state=w.SEED,
        use_gradient_checkpointing="unsloth" if workload.size.gradient_checkpointing else False,
    )  # fmt: skip


PACKED_ROWS = 4
WHOLE = 16_384
"""Tokens of a micro-batch at most, where it is a whole optimizer step."""
CARD = 80 << 30
"""Bytes of the card for which a plan chooses the layers that recompute."""

ARMS: dict[str, Callable[[Workload, int, Pace], None]] = {
    "budwood": budwood,
    "budwood-compile": partial(budwood, compile=True),
    "budwood-auto": partial(budwood, gradient_checkpointing="auto"),
    "trainer-1": trainer(1),
    "trainer-2": trainer(2),
    "trainer-4": trainer(4),
    "trainer-8": trainer(8),
    "trainer-11": trainer(11),
    "trainer-16": trainer(16),
    "trl": sft(packed=False),
    "trl-packed": sft(packed=True),
    "unsloth": sft(packed=True, load=_unsloth_model),
}


def _arguments(workload: Workload, steps: int, rows: int) -> dict[str, Any]:
    """Return the training arguments shared by the peers; everything else is the peer's default."""
    import torch

    return {
        "output_dir": str(workload.folder / "peers"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": workload.examples // rows,
        "max_steps": steps,
        "learning_rate": w.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": w.CLIP,
        "bf16": workload.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": workload.size.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if workload.size.gradient_checkpointing else None,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": w.SEED,
    }


def _tokenizer(workload: Workload) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(workload.base)


def _peft_model(workload: Workload) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32
    quantization = None
    if workload.size.quantization != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=workload.size.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        workload.base, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )
    set_seed(w.SEED)
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if workload.size.experts:  # all-linear would also train the routers, and double the rank of gate_up_proj
        targets = {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }
    lora = LoraConfig(r=w.RANK, lora_alpha=w.ALPHA, task_type="CAUSAL_LM", **targets)
    return get_peft_model(model, lora)


def _labels(ids: list[int], prompt: int) -> list[int]:
    return [-100] * prompt + ids[prompt:]


def _dataset(workload: Workload) -> Any:
    from datasets import Dataset

    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": _labels(ids, prompt)}
        for ids, prompt in workload.tokens()
    ]
    return Dataset.from_list(rows)


def _packed_dataset(workload: Workload) -> Any:
    from datasets import Dataset

    examples, rows = workload.tokens(), []
    for start in range(0, len(examples), workload.examples):
        step = sorted(examples[start : start + workload.examples], key=lambda example: -len(example[0]))
        bins: list[list[tuple[list[int], int]]] = [[] for _ in range(PACKED_ROWS)]
        for example in step:  # the longest first, into the emptiest row
            min(bins, key=lambda row: sum(len(ids) for ids, _ in row)).append(example)
        for row in bins:
            rows.append(
                {
                    "input_ids": [i for ids, _ in row for i in ids],
                    "labels": [label for ids, prompt in row for label in _labels(ids, prompt)],
                    "seq_lengths": [len(ids) for ids, _ in row],
                }
            )
    return Dataset.from_list(rows)


def _pacer(pace: Pace) -> Any:
    from transformers import TrainerCallback

    class Pacer(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pace.ready()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                pace.stepped(float(logs["loss"]))

    return Pacer()
