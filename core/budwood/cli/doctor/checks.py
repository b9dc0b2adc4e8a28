"""Whether this machine can tune: what is installed, what it computes with, and what to do where it cannot.

Libraries with native code, and plugins, are tried in a process of their own: one that crashes is named like any other
that fails.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import budwood
from budwood.contract.discovery import WORDS, Installed
from budwood.contract.loading import check_plugin, every_installed
from budwood.errors import BudwoodError, InputError, describe
from budwood.model.quiet import silence_libraries

Status = Literal["ok", "note", "warning", "problem"]

OURS = "budwood"
PATIENCE = 180.0
"""Seconds after which a library or plugin that says nothing counts as hanging."""
LOW_MEMORY = 2 << 30
LOW_DISK = 2 << 30
NF4_GAP = 0.1520
"""Half of the widest gap between two levels of NF4 (-1 and -0.6962), and a little: the largest error, in a block's
largest weight."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: python, versions, memory, disk, cache, torch, device, bitsandbytes or plugins.
        status: "problem": tuning would fail; "warning": something is wrong that no usual run needs; "note": worth
            knowing.
        text: what was found.
        remedy: what to do; empty where there is nothing to do.
        values: figures and names, for programs.
    """

    topic: str
    status: Status
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def examine() -> list[Finding]:
    """Look at everything; the first findings name the software, the last ones the plugins."""
    found: list[Finding] = []
    for topic, check in (
        ("python", check_python), ("versions", check_versions), ("memory", check_memory), ("disk", check_disk),
        ("cache", check_cache),
    ):  # fmt: skip
        try:
            found += check()
        except Exception as error:  # packaging or psutil is missing or broken
            remedy = "install budwood again in this environment: pip install --force-reinstall budwood"
            found.append(Finding(topic, "problem", f"{topic} cannot be looked at: {describe(error)}", remedy))
    return found + try_apart({"torch": check_torch, "bitsandbytes": check_bitsandbytes, "plugins": check_plugins})


def check_python() -> Iterator[Finding]:
    """The interpreter, and Budwood itself."""
    from packaging.specifiers import SpecifierSet

    version, wanted = platform.python_version(), str(metadata.metadata(OURS).json.get("requires_python", ""))
    values = {"version": version, "executable": sys.executable, "budwood": budwood.__version__}
    text = f"Python {version} ({sys.executable}), budwood {budwood.__version__}"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("python", "ok", text, values=values)
    else:
        yield Finding("python", "problem", f"{text}: Python {wanted} is needed", "use another Python.", values)
    if sys.platform != "linux":
        yield Finding("python", "note", f"{platform.system()} is not tested; Linux is")


def tested_versions() -> dict[str, str]:
    """Version of each package that the tests, the demo and the benchmarks ran on; empty where the list is not there."""
    package = Path(budwood.__file__).parent
    for file in (package / "constraints.txt", package.parents[1] / "constraints.txt"):  # in a wheel, in a checkout
        if file.is_file():
            lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
            return {_canonical(name): pin for name, _, pin in (line.partition("==") for line in lines if line)}
    return {}


def check_versions() -> Iterator[Finding]:
    """What Budwood stands on: in the range that it needs, and where it is not the version that was tested."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    tested = tested_versions()
    if not tested:
        yield Finding("versions", "note", "constraints.txt is not here, so that versions are not compared with it")
    same: list[str] = []
    direct = [r for r in map(Requirement, metadata.requires(OURS) or ()) if _applies(r)]
    for requirement in direct:
        name, pin = requirement.name, tested.get(_canonical(requirement.name), "")
        have = _version(name)
        values = {"package": name, "version": have, "tested": pin, "needed": str(requirement.specifier)}
        if have is None:
            text = f"{name} is not installed"
            yield Finding("versions", "problem", text, f"pip install '{requirement}'", values)
        elif not requirement.specifier.contains(have, prereleases=True):
            text = f"{name} {have}: {requirement.specifier} is needed"
            yield Finding("versions", "problem", text, f"pip install '{requirement}'", values)
        elif pin and Version(have).public != Version(pin).public:
            age = "newer" if Version(have) > Version(pin) else "older"
            text = f"{name} {have} is {age} than the tested {pin}"
            yield Finding("versions", "note", text, f"pip install {name}=={pin}, if something fails", values)
        else:
            same.append(f"{name} {have}")
    yield Finding("versions", "ok", f"{len(same)} of {len(direct)} direct dependencies as tested: {', '.join(same)}")
    beyond = []
    for name in sorted(_below(direct) - {_canonical(r.name) for r in direct}):
        installed, pin = _version(name), tested.get(name, "")
        if installed and pin and Version(installed).public != Version(pin).public:
            beyond.append(f"{name} {installed} (tested: {pin})")
    if beyond:
        yield Finding("versions", "note", f"further packages of other versions: {', '.join(beyond)}")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _applies(requirement: Any) -> bool:
    """Whether a requirement holds on this machine without any extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _below(direct: Sequence[Any]) -> set[str]:
    """Canonical names of all that the direct dependencies need in turn."""
    from packaging.requirements import Requirement

    seen: set[str] = set()
    waiting = [_canonical(r.name) for r in direct]
    while waiting:
        name = waiting.pop()
        if name not in seen and _version(name) is not None:
            seen.add(name)
            waiting += [_canonical(r.name) for r in map(Requirement, metadata.requires(name) or ()) if _applies(r)]
    return seen


def check_memory() -> Iterator[Finding]:
    """The host's memory, as far as this process may use it."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    total, available = memory.total, memory.available
    text = ""
    if limit is not None and limit < total:  # a container's
        total, available, text = limit, min(available, limit - (used or 0)), ", as this container is limited"
    values = {"total": total, "available": available}
    text = f"{_gib(available)} of {_gib(total)} memory available{text}"
    if available < LOW_MEMORY:
        remedy = "close what else runs; quantise the base; lower train.micro_tokens and data.max_length."
        yield Finding("memory", "warning", text, remedy, values)
    else:
        yield Finding("memory", "ok", text, values=values)


def _cgroup(name: str) -> int | None:
    """A figure of the process's control group, version 2, in bytes."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):  # none, or "max"
        return None


def check_disk(working: Path | None = None) -> Iterator[Finding]:
    """Whether the working folder (None: the current one) and temporary files can be written."""
    try:
        yield _disk(
            "working folder", working or Path.cwd(), "change to a folder that you may write, or name an output."
        )
    except OSError as error:  # the folder is gone
        yield Finding("disk", "problem", f"the working folder: {error.strerror}", "change to another folder.")
    wanted = os.environ.get("TMPDIR")
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        yield Finding("disk", "problem", f"no folder for temporary files: {error}", "set TMPDIR to one.")
    else:
        yield _disk("temporary files", folder, "set TMPDIR to a folder that you may write.")
        if wanted and Path(wanted).resolve() != folder.resolve():
            text = f"TMPDIR is {wanted}, which cannot be used; temporary files go to {folder}"
            yield Finding("disk", "warning", text, "make that folder, or set TMPDIR to another.")


def _disk(what: str, folder: Path, remedy: str) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".budwood-doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        text = f"{what}: {folder} cannot be written ({error.strerror or error})"
        return Finding("disk", "problem", text, remedy, {"folder": str(folder), "writable": False})
    values = {"folder": str(folder), "writable": True, "free": free}
    text = f"{what}: {folder} is writable, {_gib(free)} free"
    if free < LOW_DISK:
        return Finding("disk", "warning", text, "make room: a run writes its adapter and its checkpoints.", values)
    return Finding("disk", "ok", text, values=values)


def check_cache() -> Iterator[Finding]:
    """Where the token cache is, how large it is, and how large it may become."""
    from budwood.data import cache

    folder = cache.default_folder()
    size = sum(stat.st_size for stat in cache.entries(folder).values())
    values: dict[str, Any] = {"folder": str(folder), "size": size}
    try:
        limit = cache.size_limit()
    except InputError as error:
        yield Finding("cache", "problem", str(error), "correct or unset BUDWOOD_CACHE_LIMIT.", values)
        return
    text = f"token cache: {folder}, {_gb(size)} of at most {_gb(limit)} (BUDWOOD_CACHE_LIMIT changes that)"
    yield Finding("cache", "ok", text, values=values | {"limit": limit})


def check_torch() -> Iterator[Finding]:
    """torch, tried on the CPU; the devices that it sees, each tried; and the one that a run would take."""
    try:
        import torch

        a = torch.ones(8, 8, requires_grad=True)
        (a @ a).sum().backward()
        version, built_for = torch.__version__, torch.version.cuda
    except Exception as error:
        text = f"torch does not work: {describe(error)}"
        yield Finding("torch", "problem", text, "install it as pytorch.org says, in this environment.")
        return
    kind = f"CUDA {built_for}" if built_for else "the CPU alone" if torch.version.hip is None else "ROCm"
    values = {"version": version, "cuda": built_for, "threads": torch.get_num_threads()}
    yield Finding("torch", "ok", f"torch {version}, built for {kind}, {torch.get_num_threads()} threads", values=values)
    yield from _check_cuda(torch)
    try:
        from budwood.model.machine import pick_device_precision

        device, dtype, reason = pick_device_precision("auto", "auto")
        name = str(dtype).removeprefix("torch.")
        values = {"device": str(device), "dtype": name}
        yield Finding("device", "ok", f"a run would compute on {device} in {name} ({reason})", values=values)
    except BudwoodError as error:
        yield Finding("device", "problem", str(error))


def _check_cuda(torch: Any) -> Iterator[Finding]:
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("device", "ok", "no CUDA device")
        elif torch.version.cuda is None:
            text = f"NVIDIA driver {driver} is here, but this torch is built for the CPU alone"
            yield Finding("device", "warning", text, "install torch for CUDA as pytorch.org says, to use the GPU.")
        else:
            text = (
                f"NVIDIA driver {driver} is here, but torch finds no device (it is built for CUDA {torch.version.cuda})"
            )
            remedy = "update the driver, or install torch for an older CUDA; look at CUDA_VISIBLE_DEVICES."
            yield Finding("device", "warning", text, remedy)
        return
    for index in range(torch.cuda.device_count()):
        where = f"cuda:{index}"
        try:
            about = torch.cuda.get_device_properties(index)
            a = torch.ones(64, 64, device=where)
            if float((a @ a).sum()) != 64.0**3:
                raise RuntimeError("a product of matrices came out wrong")
            free, total = torch.cuda.mem_get_info(index)
        except Exception as error:
            remedy = "install torch for this device and driver as pytorch.org says, or use base.device: cpu."
            yield Finding("device", "problem", f"{where} does not work: {describe(error)}", remedy)
            continue
        values = {
            "device": where, "name": about.name, "capability": [about.major, about.minor],
            "memory": total, "free": free, "driver": driver, "cuda": torch.version.cuda,
        }  # fmt: skip
        text = f"{where}: {about.name}, capability {about.major}.{about.minor}, {_gib(free)} of {_gib(total)} free, "
        text += f"driver {driver or 'unknown'}"
        low = free < LOW_MEMORY
        remedy = "end what else uses it (nvidia-smi lists that)." if low else ""
        yield Finding("device", "warning" if low else "ok", text, remedy, values)


def _driver() -> str | None:
    """Version of the NVIDIA driver, where there is one."""
    try:
        found = re.search(r"Kernel Module[^\n]*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else "of unknown version"
    except OSError:
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None
    except (OSError, subprocess.SubprocessError):
        return None


def check_bitsandbytes() -> Iterator[Finding]:
    """bitsandbytes on the device at hand: NF4 there and back within its bound, a 4-bit linear forward and backward."""
    remedy = "pip install -U bitsandbytes; without it `quantization: none` still works."
    import torch

    try:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
    except Exception as error:
        yield Finding("bitsandbytes", "problem", f"bitsandbytes does not import: {describe(error)}", remedy)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = bitsandbytes.__version__
    try:
        error_share, forward, backward = exercise_four_bit(bitsandbytes, device)
    except Exception as error:
        text = f"bitsandbytes {version} fails on {device}: {describe(error)}"
        yield Finding("bitsandbytes", "problem", text, remedy)
        return
    values = {
        "version": version, "device": device, "nf4_error": error_share, "nf4_bound": NF4_GAP,
        "forward_error": forward, "backward_error": backward,
    }  # fmt: skip
    text = f"bitsandbytes {version} on {device}: NF4 within {error_share:.3f} of a block's largest weight "
    text += f"(bound {NF4_GAP}), Linear4bit forward within {forward:.0e}, backward within {backward:.0e}"
    if error_share <= NF4_GAP and forward <= 0.01 and backward <= 0.01:  # TF32 keeps three digits
        yield Finding("bitsandbytes", "ok", text, values=values)
    else:  # NaN too
        yield Finding("bitsandbytes", "problem", f"{text}: it computes wrongly here", remedy, values)


def exercise_four_bit(bitsandbytes: Any, device: str) -> tuple[float, float, float]:
    """Use NF4 on a small tensor.

    Returns:
        The largest error of a weight, in units of its block's largest; the largest error of a 4-bit linear's output and
        of its input's gradient against the dequantised weight, in units of the largest value.
    """
    import torch

    functional = bitsandbytes.functional
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=draw).to(device)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    restored = functional.dequantize_4bit(packed, state)
    errors = (restored - weight).abs().view(-1, 64).amax(1) / weight.abs().view(-1, 64).amax(1)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    inputs = torch.randn(4, 128, generator=draw).to(device).requires_grad_()
    outputs = layer(inputs)
    gradient = torch.randn(4, 64, generator=draw).to(device)
    outputs.backward(gradient)
    dense = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert inputs.grad is not None
    return float(errors.max()), _off(outputs, inputs @ dense.T), _off(inputs.grad, gradient @ dense)


def _off(found: Any, expected: Any) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def check_plugins(skip: int = 0) -> Iterator[Finding]:
    """Every installed plugin, imported and checked, from number `skip` on."""
    for group, entry in every_installed()[skip:]:
        status = check_plugin(group, entry)
        yield _judge(status.kind, entry, status.problem)


def _judge(kind: str, entry: Installed, problem: str) -> Finding:
    """A broken plugin fails the recipes that name it; only one of Budwood's own is needed for tuning at all."""
    values = {"kind": kind, "name": entry.name, "distribution": entry.distribution, "version": entry.version}
    if not problem:
        return Finding("plugins", "ok", f"{kind} {entry.name} of {entry.owner}", values=values)
    needed = any(other.distribution == OURS for _, other in every_installed() if other.name == entry.name)
    return Finding("plugins", "problem" if needed else "warning", problem, values=values)


def try_apart(checks: dict[str, Callable[..., Iterator[Finding]]], patience: float = PATIENCE) -> list[Finding]:
    """Run checks of this module in a process of their own; one that crashes or hangs is a finding, and others go on."""
    found: list[Finding] = []
    topics = {check.__name__: topic for topic, check in checks.items()}
    names, skip = list(topics), 0
    while names:
        lines, how = _child(names, skip, patience)
        found += [Finding(**line["finding"]) for line in lines if "finding" in line]
        done = [line["done"] for line in lines if "done" in line]
        names = [name for name in names if name not in done]
        if not names:
            break
        broken = names[0]
        if broken == check_plugins.__name__:  # the next plugin is the one; those after it can still be tried
            plugins = every_installed()
            skip += sum(finding.topic == "plugins" for finding in found) - skip
            group, entry = plugins[skip]
            text = f"plugin '{entry.name}' of {entry.owner} ({entry.value}) {how} when it is imported. "
            text += f"Repair or update it (pip install -U {entry.distribution}), or leave it out of the recipe."
            found.append(_judge(WORDS.get(group, group), entry, text))
            skip += 1
            names = names if skip < len(plugins) else []
        else:
            remedy = f"pip install --force-reinstall {topics[broken]}"
            found.append(Finding(topics[broken], "problem", f"{topics[broken]} {how}", remedy))
            names = names[1:]
            if broken == check_torch.__name__:
                found += [_untried(topics[name]) for name in names]
                break
    return found


def _child(names: Sequence[str], skip: int, patience: float) -> tuple[list[dict[str, Any]], str]:
    """What a process that runs the checks reports, and how it ended."""
    source, sink = os.pipe()
    code = f"from budwood.cli.doctor.checks import report; report({sink}, {list(names)!r}, {skip})"
    child = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[sink], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(sink)
    text, silent = b"", False
    with os.fdopen(source, "rb", buffering=0) as pipe:
        while not silent:
            silent = not select.select([pipe], [], [], patience)[0]
            piece = b"" if silent else pipe.read(65536)
            text += piece
            if not piece:
                break
    if silent:
        child.kill()
    code_of_end = child.wait()
    try:
        ended = signal.Signals(-code_of_end).name
    except ValueError:
        ended = f"exit code {code_of_end}"
    return _lines(text), f"says nothing for {patience:g} s" if silent else f"ends the process ({ended})"


def _lines(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def report(sink: int, names: Sequence[str], skip: int) -> None:
    """Run checks of this module by name, and write what they find to a file descriptor, one JSON object a line."""
    silence_libraries()
    broken = False
    with os.fdopen(sink, "w", encoding="utf-8") as file:
        for name in names:
            arguments = {"skip": skip} if name == check_plugins.__name__ else {}
            found = [_untried(name.removeprefix("check_"))] if broken else globals()[name](**arguments)
            for finding in found:
                print(json.dumps({"finding": asdict(finding)}), file=file, flush=True)
                broken = broken or (finding.topic, finding.status) == ("torch", "problem")
            print(json.dumps({"done": name}), file=file, flush=True)


def _untried(topic: str) -> Finding:
    return Finding(topic, "note", f"{topic} cannot be tried while torch does not work")


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
