"""`budwood adapter info | verify | merge | export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from budwood.cli import material
from budwood.cli.given import check_adapter
from budwood.cli.options import AdapterFolder, AsJson, Device, OtherBase, RecordedBase, known_dtype, new_folder
from budwood.cli.streams import echo, echo_json, print_notes
from budwood.errors import plural
from budwood.garbage import uncollected

if TYPE_CHECKING:
    from budwood.adapters.manifest import GoldenRecord, MadeRecord, Manifest
    from budwood.adapters.store import SavedAdapter
    from budwood.serving.exports.wanted import Exported
    from budwood.serving.verify import VerifyReport

app = typer.Typer(help="Inspect, verify, merge, export, combine and shrink saved adapters.", no_args_is_help=True)

Directory = AdapterFolder


@app.command()
def info(directory: Directory, as_json: AsJson = False) -> None:
    """Show an adapter's type, base, task, size and metrics. Reads no weights."""
    from budwood.adapters.store import read_adapter

    saved = read_adapter(directory, hashes=False)
    if as_json:
        echo_json(_as_json(saved))
        return
    for key, value in _lines(saved):
        shown = "".join(c if c.isprintable() else "?" for c in value)  # the file may contain control codes
        echo(f"{key:<13} {shown}")
    print_notes(saved.notes)


def _as_json(saved: SavedAdapter) -> dict[str, Any]:
    return {
        "adapter_type": saved.adapter_type,
        "tensors": len(saved.infos),
        "parameters": saved.parameters,
        "bytes": saved.bytes,
        "config": saved.config,
        "manifest": saved.manifest.model_dump() if saved.manifest else None,
        "notes": saved.notes,
    }


def _lines(saved: SavedAdapter) -> list[tuple[str, str]]:
    """Return (label, value) per line, most important first."""
    manifest = saved.manifest
    dtypes = ", ".join(sorted({info.dtype for info in saved.infos.values()}))
    size = f"{plural(len(saved.infos), 'tensor')}, {saved.parameters:,} parameters, {saved.bytes:,} bytes ({dtypes})"
    if manifest is None:
        return [("adapter type", f"{saved.adapter_type}, saved by stock PEFT"), ("size", size)]
    base = manifest.base
    lines = [
        ("adapter type", f"{manifest.adapter_type}, from {manifest.distribution}"),
        ("base", f"{base.name} ({base.fingerprint[:12]}), {base.quantization}, {base.dtype}"),
        ("task", manifest.task + (f": {', '.join(manifest.labels)}" if manifest.labels else "")),
        ("size", size),
        *([("made", _made(manifest.made))] if manifest.made else []),
        *([("continues", _continued(manifest))] if manifest.parent else []),
        ("strategies", ", ".join(str(strategy.get("name")) for strategy in manifest.strategies)),
    ]
    metrics = [f"{name} {value:.4g}" for name, value in manifest.metrics.items() if value is not None]
    lines.append(("metrics", ", ".join(metrics) or "none"))
    lines.append(("golden", _setting(manifest.golden) if manifest.golden else "none"))
    return lines


def _continued(manifest: Manifest) -> str:
    assert manifest.parent is not None
    adapter = f"the adapter {manifest.parent.weights[:12]}"
    if manifest.grown_from is None:
        return adapter
    ranks = sorted({*manifest.grown_from})
    return f"{adapter}, grown from rank {' to '.join(map(str, ranks))}"


def _made(made: MadeRecord) -> str:
    parts = ", ".join(f"{part.weights[:12]} × {part.weight:g}" for part in made.parts)
    return f"{made.how} ({made.method}) of {parts}"


@app.command()
def verify(
    directory: Directory,
    base: RecordedBase = None,
    quantization: Annotated[str | None, typer.Option("--quantization", help="Default: as recorded.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="bf16, fp16 or fp32. Default: as recorded.")
    ] = None,
    device: Device = "auto",
    allow_other_base: OtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Replay an adapter's golden prompts and compare with the recorded answers."""
    check_adapter(directory, base, allow_other_base)
    with uncollected():
        from budwood.serving.verify import verify as replay

    report = replay(
        directory,
        base,
        quantization=quantization,
        precision=precision,
        device=device,
        allow_other_base=allow_other_base,
    )
    if as_json:
        values = {"recorded": report.recorded.model_dump(), "current": report.current.model_dump()}
        summary = {name: getattr(report, name) for name in ("exact", "prompts", "notes")}
        distances = {name: asdict(getattr(report, name)) for name in ("adapter", "base", "effect")}
        echo_json(summary | distances | values)
        return
    _show_replay(report)
    print_notes(report.notes)


def _show_replay(report: VerifyReport) -> None:
    if report.exact:
        echo(f"verified: {report.prompts} golden prompts, same setting ({_setting(report.current)}), within 1e-5")
        echo(f"adapter, now vs. recorded {report.adapter}")
    else:
        echo(f"different setting: recorded on {_setting(report.recorded)}; here {_setting(report.current)}")
        echo(f"adapter, now vs. recorded {report.adapter}")
        echo(f"base, now vs. recorded    {report.base}")
    echo(f"adapter vs. base          {report.effect}")


def _setting(record: GoldenRecord) -> str:
    return f"{record.device}, {record.dtype}, quantization {record.quantization}"


@app.command()
def merge(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model.", callback=new_folder)],
    base: RecordedBase = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="bf16, fp16 or fp32. Default: that in which the base is stored.", callback=known_dtype
        ),
    ] = None,
    device: Device = "cpu",
    force: Annotated[
        bool, typer.Option("--force", help="Write even if rounding changes a quarter of the adapter's effect.")
    ] = False,
    allow_other_base: OtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into the original weights of its base. Any library can open the result."""
    check_adapter(directory, base, allow_other_base)
    with uncollected():
        from budwood.adapters.golden import share_text
        from budwood.serving.merge import merge as merge_into

    report = merge_into(
        directory, out, base=base, dtype=dtype, device=device, force=force, allow_other_base=allow_other_base
    )
    if as_json:
        echo_json(asdict(report) | {"directory": str(report.directory)})
        return
    name, share = report.worst
    echo(f"merged: {report.weights} weights changed, saved in {report.dtype} to {report.directory}")
    echo(f"{report.dtype} rounds away {report.rounded_away:.1%} of the update (most in {name}: {share:.1%})")
    echo(f"error from rounding            {share_text(report.error)}")
    echo(f"vs. unquantised base + adapter {report.unquantized}")
    if report.recorded is not None:
        echo(f"vs. what training recorded     {report.recorded}")
    print_notes(report.notes)


@app.command()
def export(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the export.", callback=new_folder)],
    target: Annotated[
        str | None, typer.Option("--for", help="Program: peft, vllm, gguf (llama.cpp), ollama or merged.")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--as", help="An adapter type to convert it to, such as lora. Default: its own.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="With --as lora: the largest rank; any linear method becomes LoRA.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="gguf and ollama: the merged model instead of the adapter.")
    ] = False,
    with_base: Annotated[bool, typer.Option("--with-base", help="gguf: also write the base as base.gguf.")] = False,
    base: RecordedBase = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="Of the base in the comparison. Default: as recorded.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Of merged weights: bf16, fp16 or fp32. Default: see merge.", callback=known_dtype
        ),
    ] = None,
    device: Device = "auto",
    max_lora_rank: Annotated[
        int | None, typer.Option("--max-lora-rank", help="That of the vLLM server; a larger rank is refused.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load the export again on the base, and compare answers.")
    ] = True,
    push: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload the folder to this repository of the hub.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write even if a quarter of the adapter's effect is lost.")
    ] = False,
    allow_other_base: OtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Write a folder for another program: stock PEFT, vLLM, llama.cpp, Ollama, or a merged model.

    With --for, the export is loaded again on the base and compared with the adapter and its golden answers. Without
    it, the folder is one for stock PEFT, written from the adapter's file alone.
    """
    if target is None:
        from budwood.adapters.export import check_no_target

        check_no_target(
            rank=rank, merged=merged, with_base=with_base, base=base, quantization=quantization, dtype=dtype,
            max_lora_rank=max_lora_rank, no_check=not check, push=push, force=force, json=as_json,
            device=device != "auto", allow_other_base=allow_other_base,
        )  # fmt: skip
        from budwood.adapters.export import export as write

        echo(f"exported to {write(directory, out, format or 'peft')}")
        return
    check_adapter(directory, base, allow_other_base)
    with uncollected():
        from budwood.serving.exports.push import check_repository, upload
        from budwood.serving.exports.targets import export_for
        from budwood.serving.exports.wanted import Wanted

    wanted = Wanted(
        target, format, rank, merged, with_base, base, quantization, dtype, device, max_lora_rank, check, force,
        allow_other_base,
    )  # fmt: skip
    if push is not None:
        check_repository(push)
    done = export_for(directory, out, wanted)
    if as_json:
        echo_json(asdict(done))
    else:
        _show_export(done)
        print_notes(list(dict.fromkeys([*(done.replay.notes if done.replay is not None else ()), *done.notes])))
    if push is not None:
        echo(f"pushed to {upload(done.directory, push)}", err=as_json)


def _show_export(done: Exported) -> None:
    from budwood.adapters.golden import share_text

    echo(f"exported to {done.directory}")
    for line in done.lines:
        echo(f"  {''.join(c if c.isprintable() else '?' for c in line)}")  # names may contain control codes
    if done.merged is not None:
        report = done.merged
        echo(f"loaded again: the merged weights; error from rounding {share_text(report.error)}")
        if report.recorded is not None:
            echo(f"vs. what training recorded {report.recorded}")
    if done.replay is None:
        if done.merged is None:
            echo("not compared (--no-check): whether it answers as the adapter does is not known")
        return
    replay = done.replay
    echo(f"loaded again: {replay.prompts} prompts on the base ({replay.quantization}, fp32)")
    echo(f"vs. the adapter            {replay.conversion}; {share_text(replay.error)}")
    if replay.recorded is not None:
        echo(f"vs. what training recorded {replay.recorded}")
    if replay.setting is not None and not replay.same:
        echo(f"the base alone, likewise   {replay.setting}")


for command in (material.combine, material.shrink, material.diff):
    app.command()(command)
