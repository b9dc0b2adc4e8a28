"""`python -m benchmarks.scale`: what the processes of a run hold and exchange, against the least possible.

On the CPU over gloo, at 1, 2 and 4 processes, replicated and sharded, unquantised and in nf4, in fp32. Every process
counts its collectives and their bytes in an optimizer step, and measures the peak of its tensors in a step, as
`benchmarks.plan` does. Beside it stands the plan for so many processes. The base is a random Llama in fp32.

What reading takes is measured on a wider one in bf16, of 80 layers as Llama 3 70B has: the growth of the resident
memory, without what as many layers of almost no width take, which is some 10 MB of modules.

Writes docs/benchmarks/scale.json and the table in docs/scale.md after each case. Cases can be named, as in
nf4-shard-2; the others then keep their rows of the same machine and versions.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.plan import DOCS, RECIPES, build, make_base, replace_between, write_rows

MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")
CASES = [
    f"{quantization}-{parallel}-{count}"
    for quantization in ("none", "nf4") for parallel in ("replicate", "shard") for count in (1, 2, 4)
    if parallel == "replicate" or count > 1
]  # fmt: skip
SHAPE = {"hidden": 384, "inner": 1024, "layers": 16, "vocabulary": 2000}
READ = {"hidden": 1024, "inner": 2752, "layers": 80, "vocabulary": 2000}
TRAIN = {"micro_tokens": 512, "batch_tokens": 1024, "precision": "fp32"}
RANK = 8
"""Of the recipe's LoRA, on all linears of the layers."""
ROOM = 1.10
"""Target: the memory while the base is read, in that of what the process then holds."""


def main() -> None:
    """Measure all cases, or those that are named."""
    from budwood.model.quiet import silence_libraries

    silence_libraries()
    if unknown := set(sys.argv[1:]) - set(CASES):
        sys.exit(f"not a case: {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_base(root / "base", **SHAPE)
        make_base(root / "narrow", **{**READ, "hidden": 8, "inner": 16}, dtype=torch.bfloat16)
        make_base(root / "wide", **READ, dtype=torch.bfloat16)
        rows = write_rows(root, words=5)
        for name in sys.argv[1:] or CASES:
            quantization, parallel, count = name.split("-")
            case = {**RECIPES["lora"], "quantization": quantization, "train": {**TRAIN, "parallel": parallel}}
            cases[name] = measure(case, root, rows, int(count))
            print(line(cases[name]), flush=True)
            write(cases)
    missed = [n for n, case in cases.items() if "shard" in n and case["reading_peak"] > ROOM * case["held"]]
    if missed:
        sys.exit(f"more than {ROOM:.0%} of what a process holds while the base is read: {', '.join(missed)}")


def measure(case: dict[str, Any], root: Path, rows: dict[str, Path], count: int) -> dict[str, Any]:
    """Plan a case, run it in `count` processes, and return what both say of the process with the most."""
    from budwood.planning.estimate import estimate
    from budwood.planning.options import Device

    recipe = build(case, root / "base", rows, root / "run")
    planned = estimate(recipe, Device("this machine", "cpu", 1 << 40), processes=count)
    path = root / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    start(path, count)
    each = [json.loads((root / f"process-{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
    most = {name: max(process[name] for process in each) for name in each[0] if name != "collectives"}
    trained, layers = sizes(root / "base", case["quantization"])
    passes = most["passes"] if case["train"]["parallel"] == "shard" and count > 1 else 0
    return {
        "quantization": case["quantization"], "parallel": case["train"]["parallel"], "processes": count, **most,
        "collectives": each[0]["collectives"],
        "least": {
            "all_reduces": int(count > 1), "all_reduce_bytes": trained * (count > 1),
            "all_gathers": 2 * SHAPE["layers"] * passes, "all_gather_bytes": 2 * layers * passes,
        },
        "planned_peak": planned.peak, "plan": planned.exchange.as_dict() if planned.exchange else None,
    }  # fmt: skip


def start(path: Path, count: int) -> None:
    """Run `work` in `count` processes, with torchrun's variables, forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["budwood.training.loop", "budwood.testing.allocations", "torch.distributed", "peft"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    processes = []
    for rank in range(count):
        local = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        processes.append(context.Process(target=work, args=(path, {**shared, **local})))
        processes[-1].start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"exit codes of the processes: {[process.exitcode for process in processes]}")


def sizes(base: Path, quantization: str) -> tuple[int, int]:
    """Return the bytes of the gradients of the adapter, and those of the layers' matrices, by their shapes."""
    from budwood.model.checks import skeleton

    shapes = [p.shape for p in skeleton(str(base)).model.layers.parameters() if p.ndim == 2]
    elements = sum(shape.numel() for shape in shapes)
    return sum(4 * RANK * sum(shape) for shape in shapes), int(
        elements * (4 if quantization == "none" else 0.5 + 1 / 64)
    )


class Counting(TorchDispatchMode):
    """Counts collectives and their bytes, by kind: what is reduced, and what an all-gather completes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.passes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").rstrip("_")
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))

    def count_pass(self, module: Any, inputs: Any) -> None:
        """Count a forward pass of the decoder."""
        self.passes += type(module).__name__.endswith("LlamaModel")  # FSDP2 renames the class

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return calls and bytes by the name of the operation."""
        return {name: {"calls": self.calls[name], "bytes": self.bytes[name]} for name in sorted(self.calls)}


def work(path: Path, variables: dict[str, str]) -> None:
    """Measure one process, and write what was found beside the recipe."""
    os.environ |= {**variables, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    from budwood.parallel.processes import Processes
    from budwood.recipe.schema import load_recipe
    from budwood.testing.allocations import highest, steps_of, tensor_bytes

    torch.set_num_threads(1)
    recipe, world = load_recipe(path), Processes.from_environment()
    world.join(torch.device("cpu"))
    found = reading(recipe, world)
    others, peak = tensor_bytes(), 0
    counting = Counting()
    for take_step in steps_of(recipe, 2):
        before, counting = tensor_bytes() - others, Counting()
        hook = torch.nn.modules.module.register_module_forward_pre_hook(counting.count_pass)
        with counting:
            peak = max(peak, before + highest(take_step))
        hook.remove()
    found |= {"peak": peak, "passes": counting.passes, "collectives": counting.as_dict()}
    (path.parent / f"process-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    world.barrier()
    world.leave()


def reading(recipe: Any, world: Any) -> dict[str, int]:
    """Read a base, and return what the process then holds of it, and the most that it took meanwhile, in bytes."""
    from budwood.model.base import load_base
    from budwood.model.streaming import trim_heap

    shards = world if recipe.train.parallel == "shard" and world.size > 1 else None
    bases: list[Any] = []
    growth = []
    for name in ("narrow", "narrow", "wide"):  # the first time, libraries and arenas grow too
        gc.collect()
        trim_heap()
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        bases.append(
            load_base(
                Path(recipe.base.model).with_name(name), recipe.base.quantization, "AutoModelForCausalLM",
                torch.bfloat16, world=shards,
            )
        )  # fmt: skip
        growth.append((resident("VmHWM") - before, resident() - before))
    return {"held": bases[-1].bytes, "reading_peak": growth[2][0] - growth[1][1]}


def resident(name: str = "VmRSS") -> int:
    """Return the bytes of a line of this process's status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in text.splitlines() if line.startswith(name)).split()[1])


def line(case: dict[str, Any]) -> str:
    """Return a row of the table."""
    kinds, least = case["collectives"], case["least"]
    reduces, gathers = (kinds.get(name, {"calls": 0, "bytes": 0}) for name in ("allreduce", "_allgather_base"))
    read = f"{case['reading_peak'] / 1e6:,.1f} ({case['reading_peak'] / case['held'] - 1:+.0%})"
    cells = [
        f"{case['quantization']}, {case['parallel']}", str(case["processes"]), f"{case['held'] / 1e6:,.1f}", read,
        f"{case['peak'] / 1e6:,.1f}", f"{case['planned_peak'] / 1e6:,.1f}",
        f"{case['planned_peak'] / case['peak'] - 1:+.1%}",
        f"{reduces['calls']} of {reduces['bytes'] / 1e6:,.3f} ({least['all_reduces']} of "
        f"{least['all_reduce_bytes'] / 1e6:,.3f})",
        f"{gathers['calls']} of {gathers['bytes'] / 1e6:,.1f} ({least['all_gathers']} of "
        f"{least['all_gather_bytes'] / 1e6:,.1f})",
        f"{sum(kind['calls'] for kind in kinds.values()) - reduces['calls'] - gathers['calls']} of "
        f"{(sum(kind['bytes'] for kind in kinds.values()) - reduces['bytes'] - gathers['bytes']) / 1e3:,.1f} kB",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def write(cases: dict[str, dict[str, Any]]) -> None:
    """Write the record, and the table of docs/scale.md, with earlier results of the same machine and versions."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes", "peft")}
    machine = f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, one thread a process, gloo"
    setting = {"machine": machine, "versions": versions, "base": SHAPE, "read": READ, "train": TRAIN}
    path = DOCS / "benchmarks" / "scale.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if all(before.get(key) == value for key, value in setting.items()):
        cases = {**before["cases"], **cases}
    cases = {name: cases[name] for name in CASES if name in cases}
    path.write_text(json.dumps({**setting, "cases": cases}, indent=2) + "\n", encoding="utf-8")
    columns = [
        "base", "processes", "held, MB", "while reading", "peak of a step", "planned", "difference",
        "all-reduces of MB (least)", "all-gathers of MB (least)", "small messages",
    ]  # fmt: skip
    head = f"| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}"
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    table = "\n".join([head, *map(line, cases.values())])
    replace_between(DOCS / "scale.md", MARKS, f"\n{table}\n\nOn {machine}; {listed}.\n")


if __name__ == "__main__":
    main()
