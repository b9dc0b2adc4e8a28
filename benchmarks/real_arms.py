"""`python -m benchmarks.real_arms JOB`: one run of one arm of `benchmarks.real`, as a process of its own.

Each arm does what its documentation tells a user to do: read the rows, tokenise them, load the base, train, save the
adapter. Nothing is evaluated. JOB is a JSON file; the times of the steps, their losses and the peak memory are written
beside it. Times are those of the clock that all processes share, and of this process's processor time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Row = dict[str, Any]
MAX_LENGTH = 512
_GENERATED = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
MARKED_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    f"{_GENERATED}{{% else %}}{{{{ message['content'] + '<|im_end|>\n' }}}}{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's chat template with the marks by which transformers and TRL find the assistant's tokens. Budwood finds them
with the template as it is."""


class Clock:
    """The times at the start of the first step and at the end of every step: (seconds, processor seconds).

    With `profile` the second and the third step run under torch's profiler.
    """

    def __init__(self, profile: bool) -> None:
        self.times: list[tuple[float, float]] = []
        self.losses: list[float] = []
        self.loaded = 0
        self.profile = profile
        self.profiler: Any = None

    def mark(self) -> None:
        """Record the time: before the first step, and after each."""
        if not self.times:
            self.loaded = peak_bytes()
        self.times.append((time.perf_counter(), time.process_time()))
        if self.profile and len(self.times) == 2:
            from torch.profiler import ProfilerActivity, profile

            self.profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)
            self.profiler.start()
        elif self.profiler is not None and len(self.times) == 4:
            self.profiler.stop()

    def finish(self) -> list[list[Any]]:
        """Return the operators' names, own microseconds and floating-point operations, if there is a profile."""
        if self.profiler is None or len(self.times) < 4:
            return []
        return [[e.key, e.self_cpu_time_total, e.flops] for e in self.profiler.key_averages()]


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def budwood(job: Job, clock: Clock) -> dict[str, Any]:
    """Run `budwood tune` on a recipe, with a strategy that reads the clock."""
    from benchmarks.arms import install_strategy
    from benchmarks.real_clock import ClockStrategy
    from budwood.cli.app import run as command

    ClockStrategy.clock = clock
    install_strategy(Path(job["folder"]), "clock", "benchmarks.real_clock:ClockStrategy")
    task = "sequence-classification" if job["kind"] == "classification" else "causal-lm"
    recipe = {
        "base": {"model": job["base"], "quantization": job["quantization"], "task": task},
        "data": {"train": job["data"], "eval": "none", "max_length": job["max_length"]},
        "strategies": [
            {"lora": {"rank": job["rank"], "alpha": job["alpha"], "targets": job["targets"]}},
            "clock",
        ],
        "train": {
            "epochs": job["epochs"],
            "batch_examples": job["batch"],
            "learning_rate": job["rate"],
            "schedule": "constant",
            "warmup": job["warmup"],
            "clip": job["clip"],
            "precision": job["precision"],
            "seed": job["seed"],
        },
        "output": str(Path(job["folder"]) / "run"),
    }
    file = Path(job["folder"]) / "recipe.json"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    if code := command(["tune", str(file), *(["--profile"] if job["profile"] else [])]):
        raise SystemExit(code)
    run = ClockStrategy.run
    return {
        "adapter": str(run.directory / "adapter"),
        "parameters": sum(p.numel() for p in run.trainable),
        "classes": list(run.examples.labels),
        "packed": run.packed,
    }


def trainer(job: Job, clock: Clock) -> dict[str, Any]:
    """The transformers Trainer on a PEFT model, with padded rows."""
    from datasets import load_dataset
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = _tokenizer(job)
    rows = load_dataset("json", data_files=job["data"], split="train", cache_dir=job["folder"])
    classes = sorted(set(rows["label"])) if job["kind"] == "classification" else []

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        ids, labels = encode(job["kind"], row, tokenizer)
        target = {"label": classes.index(row["label"])} if classes else {"labels": labels}
        return {"input_ids": ids, "attention_mask": [1] * len(ids), **target}

    rows = rows.map(tokenise, remove_columns=rows.column_names)
    model = _peft_model(job, classes)
    fitted = Trainer(
        model=model,
        args=TrainingArguments(**_arguments(job, job["rows"])),
        train_dataset=rows.select(job["order"]),
        data_collator=DataCollatorWithPadding(tokenizer)
        if classes
        else DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[_callback(clock)],
    )
    fitted.train()
    return _saved(job, fitted, classes)


def trl(packed: bool) -> Callable[[Job, Clock], dict[str, Any]]:
    """TRL's SFTTrainer, which prepares the rows itself: padded, or all rows of a step one after the other.

    `packing` proper would join rows of different steps; `padding_free` joins those of a batch, so that every step has
    the same rows as in the other arms.
    """

    def run(job: Job, clock: Clock) -> dict[str, Any]:
        from datasets import load_dataset
        from trl import SFTConfig, SFTTrainer

        tokenizer = _tokenizer(job)
        chat = job["kind"] == "chat"
        if chat:
            tokenizer.chat_template = MARKED_TEMPLATE
        fitted = SFTTrainer(
            model=_peft_model(job, []),
            args=SFTConfig(
                **_arguments(job, job["batch"] if packed else job["rows"]),
                max_length=None if packed else job["max_length"],  # TRL refuses a limit without `packing`
                padding_free=packed,
                assistant_only_loss=chat,
                completion_only_loss=None if chat else True,
            ),
            train_dataset=load_dataset("json", data_files=job["data"], split="train", cache_dir=job["folder"]),
            processing_class=tokenizer,
            callbacks=[_callback(clock)],
        )
        fitted.train_dataset = fitted.train_dataset.select(job["order"])
        fitted.train()
        return _saved(job, fitted, [])

    return run


ARMS: dict[str, Callable[[Job, Clock], dict[str, Any]]] = {
    "budwood": budwood,
    "trainer": trainer,
    "trl": trl(packed=False),
    "trl-packed": trl(packed=True),
}


def encode(kind: str, row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids of a row and the labels: the tokens that have a loss, -100 for the others.

    A classification has no labels here.
    """
    if kind == "classification":
        return tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH)["input_ids"], []
    if kind == "chat":
        encoded = tokenizer.apply_chat_template(
            row["messages"], chat_template=MARKED_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    else:
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        mask = [0] * prompt + [1] * (len(ids) - prompt)
    labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
    return ids[:MAX_LENGTH], labels[:MAX_LENGTH]


def load(base: str, quantization: str, dtype: Any, classes: list[str]) -> Any:
    """Load a base as stock transformers does, on the CPU; with a new head if there are `classes`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": "cpu"}}
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if classes:
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(classes), **options)
    return AutoModelForCausalLM.from_pretrained(base, **options)


def _arguments(job: Job, rows: int) -> dict[str, Any]:
    """Return the training arguments of the peers; everything else is their default."""
    return {
        "output_dir": str(Path(job["folder"]) / "peer"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": job["batch"] // rows,
        "max_steps": len(job["order"]) // job["batch"],
        "learning_rate": job["rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": job["warmup"],
        "max_grad_norm": job["clip"],
        "bf16": job["precision"] == "bf16",
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
    }


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job["base"])


def _peft_model(job: Job, classes: list[str]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(job["seed"])
    # A classifier's new head is trained as it is loaded: in bf16, small updates would be rounded away.
    dtype = torch.bfloat16 if job["precision"] == "bf16" and not classes else torch.float32
    model = load(job["base"], job["quantization"], dtype, classes)
    return get_peft_model(
        model,
        LoraConfig(
            r=job["rank"],
            lora_alpha=job["alpha"],
            target_modules=job["targets"],
            task_type="SEQ_CLS" if classes else "CAUSAL_LM",
        ),
    )


def _callback(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Reader(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.mark()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.mark()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    return Reader()


def _saved(job: Job, fitted: Any, classes: list[str]) -> dict[str, Any]:
    adapter = Path(job["folder"]) / "peer" / "adapter"
    fitted.save_model(str(adapter))
    trained = sum(p.numel() for p in fitted.model.parameters() if p.requires_grad)
    return {"adapter": str(adapter), "parameters": trained, "classes": classes}


def main() -> None:
    """Run the job in the file named on the command line."""
    file = Path(sys.argv[1])
    job = json.loads(file.read_text(encoding="utf-8"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    clock = Clock(job["profile"])
    result = ARMS[job["arm"]](job, clock)
    result |= {"times": clock.times, "losses": clock.losses, "operators": clock.finish()}
    result |= {"peak_bytes": peak_bytes(), "loaded_bytes": clock.loaded}
    (file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
