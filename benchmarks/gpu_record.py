"""`make gpu-record`: everything about speed that needs a GPU, in ten minutes, stage by stage.

Each stage writes its JSON into the output folder as soon as it ends, so nothing is lost that an earlier one found. A
stage that fails, or whose time has come, is noted, and the next one begins. Stages, in this order: the matrix rate, the
bandwidth and the cost of a launch; each Triton kernel, compared with torch in bf16 and timed beside it; products of the
shapes of an 8B base, alone, added to a tensor and wider by an adapter; thin products of adapters; the head; the end
of a step; four layers of 8B in NF4, in
halves and module by module; `benchmarks.train` at 1B and 8B, each arm alone on the device, at 8B with 8k tokens a step,
and what the arms reach beside the targets.

`--dry` runs every stage on a CPU with tiny shapes, and prints the commands of the last one instead of running them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from budwood.model.streaming import release_memory

SHAPES = {"hidden": 4096, "inner": 14336, "keys": 1024, "vocabulary": 128256}
TINY = {"hidden": 128, "inner": 192, "keys": 64, "vocabulary": 512}
TOKENS, FEW = (2048, 4096, 8192, 16384), (64, 96)
SEGMENT = 310
"""Tokens of an example: the mean, weighted by tokens, of the rows of `benchmarks.train`."""
LAYERS = 4
RANK = 8
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl")
ARMS = {
    "1b": ("budwood", "trl-packed", "trainer-16", "unsloth"),
    "8b": ("budwood", "budwood-auto", "trl-packed", "unsloth", "trainer-11"),
}
"""In this order, so that what takes longest is what is missing if the time has come."""
EXAMPLES = {"1b": 16, "8b": 44}
"""Of an optimizer step: one micro-batch, at 8B of some 8,192 tokens. A Trainer takes as many rows as its name says."""
TARGETS = (
    ("8b", "budwood", "tokens_per_second", 12_500), ("8b", "budwood", "share_of_matmul_rate", 0.5),
    ("8b", "budwood-auto", "tokens_per_second", 16_000), ("8b", "budwood", "times trl-packed", 2.0),
    ("8b", "budwood", "peak_bytes", 11e9),
    ("1b", "budwood", "times trl-packed", 3.0),
)  # fmt: skip
"""What an arm shall reach at least; of bytes, at most."""


class Bench:
    """The device, the shapes, and a clock.

    Attributes:
        dry: on a CPU, with tiny shapes.
    """

    def __init__(self, dry: bool, out: Path, limit: float) -> None:
        self.dry, self.out, self.limit, self.began = dry, out, limit, time.monotonic()
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.shapes, self.tokens = (TINY, FEW) if dry else (SHAPES, TOKENS)
        self.flush = torch.empty(1 << 16 if dry else 256 << 20, dtype=torch.uint8, device=self.device)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - (time.monotonic() - self.began)

    def draw(self, *shape: int) -> Tensor:
        """Return random numbers on the device."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def seconds(self, function: Callable[[], Any]) -> float:
        """Return the median time of a call with cold caches; on a GPU, of its kernels."""
        function()
        found = []
        for _ in range(2 if self.dry else 12):
            self.flush.zero_()
            if self.dry:
                started = time.perf_counter()
                function()
                found.append(time.perf_counter() - started)
                continue
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            function()
            last.record()
            last.synchronize()
            found.append(first.elapsed_time(last) / 1e3)
        return statistics.median(found)

    def wait(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()


def peak(bench: Bench) -> dict[str, Any]:
    """Matrix rate, bandwidth, and the host's time for a launch from Python."""
    size, count = (128, 20) if bench.dry else (8192, 2000)
    a, b, copy, small = bench.draw(size, size), bench.draw(size, size), torch.empty_like(bench.flush), bench.draw(8)
    for _ in range(2):
        bench.wait()
        started = time.perf_counter()
        for _ in range(count):
            small.add_(1)
        launch = (time.perf_counter() - started) / count
    return {
        "device": "a CPU" if bench.dry else torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in PACKAGES if _has(name)},
        "matmul_flops_per_second": 2 * size**3 / bench.seconds(lambda: a @ b),
        "copied_bytes_per_second": 2 * bench.flush.nbytes / bench.seconds(lambda: copy.copy_(bench.flush)),
        "seconds_per_launch": launch,
    }


def kernels(bench: Bench) -> dict[str, Any]:
    """Each kernel compared with torch, in three dtypes, and its time beside torch's own in bf16."""
    from budwood.model.ops import gated, rms_norm, rotary
    from budwood.model.ops import kernels as ours
    from budwood.model.ops.cross_entropy import cross_entropy

    dtypes = (torch.float32,) if bench.dry else (torch.bfloat16, torch.float16, torch.float32)
    found: dict[str, Any] = {"problems": [line for dtype in dtypes for line in ours.prepare(bench.device, dtype)]}
    n, d, inner = bench.tokens[1], bench.shapes["hidden"], bench.shapes["inner"]
    x, weight, gate, up = bench.draw(n, d), bench.draw(d), bench.draw(n, inner), bench.draw(n, inner)
    heads, table = bench.draw(1, 8, n, 64).requires_grad_(), bench.draw(1, n, 64)
    logits = bench.draw(64, bench.shapes["vocabulary"]).requires_grad_()
    labels = torch.zeros(64, dtype=torch.long, device=bench.device)
    leaves = [tensor.requires_grad_() for tensor in (x, gate, up)]
    ops: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "rms_norm": (lambda: rms_norm.rms_norm(x, weight, 1e-5), leaves[:1]),
        "gated": (lambda: gated.gated(gate, up, "silu"), leaves[1:]),
        "rotary": (lambda: rotary.rotary(heads, heads, table, table)[0], [heads]),
        "cross_entropy": (lambda: cross_entropy(logits, labels), [logits]),
    }
    for name, (function, inputs) in ops.items():
        for kind in ("kernel", "torch"):
            with _without_kernels(ours) if kind == "torch" else nothing():
                above = torch.ones_like(function())
                both = bench.seconds(lambda f=function, i=inputs, g=above: torch.autograd.grad(f(), i, g))
                found[f"{name} {kind}"] = {"forward and backward seconds": both}
    return found | _dequantising(bench)


def _dequantising(bench: Bench) -> dict[str, Any]:
    """Seconds to dequantise gate, by bitsandbytes and by our kernel, and gate and up as one."""
    import bitsandbytes.functional as bnb

    from budwood.model.ops.kernels import implementation
    from budwood.model.quantizers import quantizer_of

    d, inner = bench.shapes["hidden"], bench.shapes["inner"]
    linears = [four_bit(bench, d, inner) for _ in range(2)]
    quantizer: Any = quantizer_of(linears[0])
    useful = d * inner * (2 + 0.5 + 1 / 64)
    found = {
        "bitsandbytes": bench.seconds(
            lambda: bnb.dequantize_4bit(linears[0].weight.data, linears[0].weight.quant_state)
        )
    }
    found["ours"] = bench.seconds(lambda: quantizer.dequantize(linears[0], bench.dtype))
    if implementation("dequantize_4bit", bench.flush, bench.dtype) is not None:
        found["ours, two as one"] = bench.seconds(lambda: quantizer.stack(linears, bench.dtype))
    return {f"dequantize_4bit {name}": {"seconds": s, "bytes per weight matrix": useful} for name, s in found.items()}


def products(bench: Bench) -> dict[str, Any]:
    """FLOPs per second of products with the weights of a layer: alone, added to a tensor, and with adapters inside.

    The last have 64 more columns, those of x A and of B, which count as no work.
    """
    h, inner, keys, found = bench.shapes["hidden"], bench.shapes["inner"], bench.shapes["keys"], {}
    shapes = {
        "q": (h, h),
        "qkv": (h, h + 2 * keys),
        "gate": (h, inner),
        "gate and up": (h, 2 * inner),
        "down": (inner, h),
    }
    for tokens in bench.tokens:
        for name, (inputs, outputs) in shapes.items():
            x, w, y = bench.draw(tokens, inputs), bench.draw(outputs, inputs), bench.draw(tokens, outputs)
            wide_x, wide_w = bench.draw(tokens, inputs + 64), bench.draw(outputs, inputs + 64)
            flops = 2 * tokens * inputs * outputs
            found[f"{name}, {tokens} tokens"] = {
                "alone": flops / bench.seconds(lambda x=x, w=w: x @ w.t()),
                "added": flops / bench.seconds(lambda x=x, w=w, y=y: y.addmm_(x, w.t())),
                "64 wider": flops / bench.seconds(lambda x=wide_x, w=wide_w: x @ w.t()),
            }
            del x, w, y, wide_x, wide_w
    return found


def thin(bench: Bench) -> dict[str, Any]:
    """Bytes per second of the thin products of an adapter, counting the wide operand alone; y is read and written."""
    h, inner, found = bench.shapes["hidden"], bench.shapes["inner"], {}
    for tokens in bench.tokens:
        for rank in (RANK, 3 * RANK, 64):
            x, a, b, g = bench.draw(tokens, h), bench.draw(rank, h), bench.draw(inner, rank), bench.draw(tokens, inner)
            narrow, y = bench.draw(tokens, rank), bench.draw(tokens, inner)
            ops: dict[str, tuple[int, Callable[[], Tensor]]] = {
                "x A": (x.nbytes, lambda x=x, a=a: x @ a.t()), "g B": (g.nbytes, lambda g=g, b=b: g @ b),
                "y += n B": (2 * y.nbytes, lambda y=y, n=narrow, b=b: y.addmm_(n, b.t())),
                "dA": (x.nbytes, lambda n=narrow, x=x: n.t() @ x), "dB": (g.nbytes, lambda g=g, n=narrow: g.t() @ n),
            }  # fmt: skip
            found[f"rank {rank}, {tokens} tokens"] = {k: size / bench.seconds(f) for k, (size, f) in ops.items()}
    return found


def step_end(bench: Bench) -> dict[str, Any]:
    """Seconds of what follows a step's last pass; a device idles while the host hands over all but the first."""
    from budwood.training.loop import read_together
    from budwood.training.memory import _versions

    h, inner, keys, rank = bench.shapes["hidden"], bench.shapes["inner"], bench.shapes["keys"], RANK
    sizes = [(h, h), (h, keys), (h, keys), (h, h), (h, inner), (h, inner), (inner, h)]
    shapes = [shape for a, b in sizes for shape in ((rank, a), (b, rank))] * 32
    factors = [nn.Parameter(torch.zeros(shape, device=bench.device)) for shape in shapes]
    for factor in factors:
        factor.grad = torch.full_like(factor, 1e-3)
    optimizer, norm = torch.optim.AdamW(factors, fused=True), torch.ones((), device=bench.device)
    optimizer.step()  # makes its state
    parts: dict[str, Callable[[], Any]] = {
        "read the norm": lambda: read_together({"norm": torch.nn.utils.get_total_norm([p.grad for p in factors])}),
        "clip": lambda: torch.nn.utils.clip_grads_with_norm_(factors, 1.0, norm),
        "count versions": lambda: _versions(optimizer),
        "AdamW": optimizer.step,
    }
    found: dict[str, Any] = {"tensors": len(factors)}
    for name, part in parts.items():
        times = []
        for _ in range(20):
            bench.wait()
            started = time.perf_counter()
            part()
            times.append(time.perf_counter() - started)
        found[name] = statistics.median(times)
    return found


def head(bench: Bench) -> dict[str, Any]:
    """Seconds per label of the head and its loss, forward and backward, by the labels of a chunk."""
    from budwood.model.ops.cross_entropy import cross_entropy

    h, vocabulary, found = bench.shapes["hidden"], bench.shapes["vocabulary"], {}
    w = bench.draw(vocabulary, h)
    for labels in (16, 64) if bench.dry else (256, 1024, 2048):
        x = bench.draw(labels, h).requires_grad_()
        target = torch.zeros(labels, dtype=torch.long, device=bench.device)
        found[str(labels)] = bench.seconds(lambda x=x, t=target: cross_entropy(x @ w.t(), t).sum().backward()) / labels
    return found


def layers(bench: Bench) -> dict[str, Any]:
    """Layers of 8B in NF4 with adapters, forward and backward: wall clock, kernels, launches and memory."""
    from torch.profiler import ProfilerActivity, profile

    from budwood.model.recompute import recompute_layers

    model, found = stack(bench), {}
    for tokens in bench.tokens:
        for recomputes in (True, False):
            recompute_layers(model, recomputes)
            for name, context in (("halves", nothing), ("modules", own_forward)):
                step = step_of(bench, model, tokens)
                with context():
                    for _ in range(1 if bench.dry else 3):
                        step()
                    bench.wait()
                    if not bench.dry:
                        torch.cuda.reset_peak_memory_stats()
                    times = []
                    for _ in range(1 if bench.dry else 5):
                        started = time.perf_counter()
                        step()
                        bench.wait()
                        times.append(time.perf_counter() - started)
                    kinds = [ProfilerActivity.CPU, *([] if bench.dry else [ProfilerActivity.CUDA])]
                    with profile(activities=kinds) as profiled:
                        step()
                        bench.wait()
                events = profiled.key_averages()
                device = "self_cpu_time_total" if bench.dry else "self_device_time_total"
                kernels = on_device(events, "cpu" if bench.dry else "cuda")
                top = sorted(kernels, key=lambda event: getattr(event, device), reverse=True)[:15]
                found[f"{tokens} tokens, {'recomputed' if recomputes else 'kept'}, {name}"] = {
                    "seconds": statistics.median(times),
                    "seconds of kernels": sum(getattr(event, device) for event in kernels) / 1e6,
                    "launches": sum(event.count for event in events if "LaunchKernel" in event.key),
                    "peak bytes": 0 if bench.dry else torch.cuda.max_memory_allocated(),
                    "longest": [[e.key[:60], e.count, round(getattr(e, device) / 1e3, 3)] for e in top],
                }
    return found


def on_device(events: Any, kind: str) -> list[Any]:
    """Return the events of a device; the operations that launched its kernels carry the same time again."""
    types = {"cpu": DeviceType.CPU, "cuda": DeviceType.CUDA}
    return [event for event in events if event.device_type == types[kind] and not event.is_user_annotation]


def four_bit(bench: Bench, inputs: int, outputs: int) -> Any:
    """Return a linear in NF4 with random weights."""
    import bitsandbytes

    from budwood.model.quantizers.cpu_kernel import install

    install()
    linear = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=bench.dtype, quant_type="nf4")
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16) * inputs**-0.5
    linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    linear.to(bench.device)
    linear.support_avx512bf16_for_cpu = False
    return linear


def stack(bench: Bench, quantized: bool = True, dropout: float = 0.0) -> Any:
    """Return a decoder of few layers in NF4, or in 16 bit, with adapters on all linears, as a run prepares it."""
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaModel

    from budwood.adapters.peft_layers import select_adapters
    from budwood.model.halves.take_over import use_own_operations
    from budwood.model.ops import attention
    from budwood_lora.layers import add_adapter

    attention.register()
    h, keys = bench.shapes["hidden"], bench.shapes["keys"]
    size = bench.shapes.get("head", h // 32 if not bench.dry else 16)
    config = LlamaConfig(
        vocab_size=8, hidden_size=h, intermediate_size=bench.shapes["inner"], head_dim=size, use_cache=False,
        num_hidden_layers=2 if bench.dry else LAYERS, num_attention_heads=h // size, num_key_value_heads=keys // size,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaModel._from_config(config, attn_implementation=attention.IMPLEMENTATION)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        old, (parent, _, leaf) = model.get_submodule(name), name.rpartition(".")
        if quantized:
            setattr(model.get_submodule(parent), leaf, four_bit(bench, old.in_features, old.out_features))
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                full = bench.draw(*parameter.shape) * 0.02 + (parameter.dim() == 1)
                module._parameters[leaf] = nn.Parameter(full, requires_grad=False)
    model.rotary_emb = type(model.rotary_emb)(config).to(bench.device)
    use_own_operations(model)
    lora = LoraConfig(r=RANK, lora_alpha=16, lora_dropout=dropout, target_modules=names, init_lora_weights=False)
    add_adapter(model, lora, "default")
    select_adapters(model, "lora", ["default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.train()


def step_of(bench: Bench, model: Any, tokens: int) -> Callable[[], None]:
    """Return a forward and backward pass over a packed row."""
    from budwood.model.ops.attention import packed_mask

    x, above = bench.draw(1, tokens, bench.shapes["hidden"]), bench.draw(1, tokens, bench.shapes["hidden"])
    segments = (*range(0, tokens, SEGMENT), tokens)
    positions = (torch.arange(tokens, device=bench.device) % SEGMENT)[None]

    def step() -> None:
        with torch.autocast(bench.device.type, bench.dtype, bench.dtype != torch.float32):
            y = model(
                inputs_embeds=x, position_ids=positions, segments=segments, attention_mask=packed_mask(bench.device)
            )
        y.last_hidden_state.backward(above)
        model.zero_grad(set_to_none=True)

    return step


def train(bench: Bench) -> dict[str, Any]:
    """`benchmarks.train` at 1B and 8B, one arm at a time: 3 steps to warm up, 3 rounds of 5; the Trainer at 8B one."""
    found: dict[str, Any] = {}
    for size, names in ARMS.items():
        with tempfile.TemporaryDirectory(prefix="budwood-bench-") as folder:  # arms share its base
            for name in names:
                found[f"{size}, {name}"] = _arm(bench, size, name, Path(folder))
    return {**found, "compared": compared(found)}


def _arm(bench: Bench, size: str, name: str, folder: Path) -> dict[str, Any]:
    """Return what `benchmarks.train` measures of an arm, or why it does not."""
    to, rounds = bench.out / f"train-{size}-{name}.json", "1" if (size, name) == ("8b", "trainer-11") else "3"
    words = ["--size", size, "--arms", name, "--warmup", "3", "--rounds", rounds, "--steps", "5", "--out", str(to)]
    words += ["--examples", str(EXAMPLES[size]), "--base", str(folder / "base")]
    command = [sys.executable, "-m", "benchmarks.train", *words]
    if bench.dry:
        return {"command": command}
    if name == "unsloth" and not _has(name):
        return {"skipped": "unsloth is not installed"}
    if bench.left < 30:
        return {"late": True}
    code, errors = finish(command, bench.left, folder)
    if code is None:
        return {"late": True}
    result: dict[str, Any] = json.loads(to.read_text()) if code == 0 else {"failed": errors[-1500:]}
    return result


def finish(command: list[str], seconds: float, folder: Path) -> tuple[int | None, str]:
    """Run a command for at most so many seconds, then end it with the processes that it started.

    Args:
        folder: of its temporary files, which it leaves if it is ended.

    Returns:
        The exit code, None if the time has come, and what it wrote to stderr.
    """
    options: Any = {"start_new_session": True, "env": {**os.environ, "TMPDIR": str(folder)}, "text": True}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options) as process:
        try:
            errors = process.communicate(timeout=seconds)[1]
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, ""
    return process.returncode, errors


def compared(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what Budwood's arms reach, also in times the tokens a second of each peer, beside the targets."""
    rows: list[dict[str, Any]] = []
    targets = {(size, name, what): bound for size, name, what, bound in TARGETS}
    for size, names in ARMS.items():
        arms = {name: found[f"{size}, {name}"].get("arms", {}).get(name) for name in names}
        for name in (name for name in names if name.startswith("budwood")):
            values = {what: None for s, n, what in targets if (s, n) == (size, name)}
            if (own := arms[name]) is not None:
                values |= {what: own[what] for what in ("tokens_per_second", "share_of_matmul_rate", "peak_bytes")}
                rate = own["tokens_per_second"]
                others = {peer: arm for peer, arm in arms.items() if arm is not None and not peer.startswith("budwood")}
                values |= {f"times {peer}": rate / arm["tokens_per_second"] for peer, arm in others.items()}
            for what, value in values.items():
                row = {"size": size, "arm": name, "what": what, "found": value}
                if (bound := targets.get((size, name, what))) is not None:
                    reached = None if value is None else value <= bound if what == "peak_bytes" else value >= bound
                    row |= {"target": bound, "met": reached}
                rows.append(row)
    return rows


STAGES = {f.__name__: f for f in (peak, kernels, products, thin, head, step_end, layers, train)}


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def _without_kernels(module: Any) -> Iterator[None]:
    """Let torch compute what a kernel would."""
    passes = module._passes
    module._passes = lambda *_: False
    try:
        yield
    finally:
        module._passes = passes


@contextmanager
def own_forward() -> Iterator[None]:
    """Let each layer take the model's own forward."""
    from budwood.model.halves.layer import Halves

    chain = Halves.chain
    Halves.chain = lambda *_: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Halves.chain = chain  # type: ignore[method-assign]


def _has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def record(bench: Bench, names: list[str]) -> dict[str, Any]:
    """Run the stages, and write each one's JSON."""
    bench.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in names:
        started = time.monotonic()
        release_memory()  # of the stage before, which the arms of another process would lack
        try:
            found = STAGES[name](bench) if bench.left > 0 else {"late": True}
        except Exception:  # a device, a driver, a library: the next stage may work
            found = {"failed": traceback.format_exc()[-1500:]}
        results[name] = {"stage_seconds": round(time.monotonic() - started, 1), **found}
        (bench.out / f"{name}.json").write_text(json.dumps(results[name], indent=1) + "\n", encoding="utf-8")
        state = "failed" if "failed" in found else "late" if found.get("late") else "done"
        print(f"{name}: {state} after {results[name]['stage_seconds']} s", flush=True)
    return results


def main(words: list[str] | None = None) -> int:
    """Run the stages; the exit code is 3 without a GPU, and 1 if a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_record", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/gpu"), help="folder of the JSON files")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--limit", type=float, default=580, help="seconds in all (default 580)")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny shapes")
    chosen = parser.parse_args(words)
    if not chosen.dry and not torch.cuda.is_available():
        print("error: no CUDA device: --dry runs every stage on a CPU, with tiny shapes", file=sys.stderr)
        return 3
    results = record(Bench(chosen.dry, chosen.out, chosen.limit), chosen.stages)
    return int(any("failed" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
