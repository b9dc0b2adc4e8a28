"""Writes report.html of a run: one page without outside assets or scripts, from the files in the run's folder.

All text from data, models and recipes is escaped. What a strategy logs is drawn; its files are read by their contents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from budwood.recipe.file import dump
from budwood.training.charts import chart
from budwood.training.runs import RunFiles, read_run, records, running_mean
from budwood.untrusted.files import complete_file

PAGE = "report.html"
CORE = ("loss", "learning_rate", "gradient_norm", "tokens_per_second")
"""Metrics of a step that core logs; all others are a strategy's."""
TEXT = 600
"""Characters of a text that are shown."""
SAMPLES = 3
"""Best samples, and worst samples, that are shown."""
COSTS = 12
"""Most expensive hooks that are shown."""


def write_page(directory: Path) -> None:
    """Write report.html from what is in a run's folder.

    Raises:
        BudwoodError: the folder is not a run's, or the page cannot be written.
    """
    complete_file(directory / PAGE, page(read_run(directory)).encode())


def page(run: RunFiles) -> str:
    """Return the page as HTML."""
    style = (resources.files("budwood") / "training" / "page.css").read_text(encoding="utf-8")
    name, sections = run.directory.name or "run", (
        _metrics(run), _curves(run), _figures(run), _samples(run), _ranks(run), _experts(run), _composition(run),
        _data(run), _plan(run), _environment(run), _recipe(run),
    )  # fmt: skip
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{style}</style></head><body><main>"
        f"<h1>{escape(name)}</h1>{_head(run)}{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str, folded: bool = False) -> str:
    if not body:
        return ""
    if folded:
        return f"<section><details><summary><h2>{escape(title)}</h2></summary>{body}</details></section>"
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """Return a table; the first `words` columns are text, the others are aligned as numbers."""

    def row(cells: Sequence[Any], tag: str) -> str:
        marks = ("" if i < words else ' class="n"' for i in range(len(cells)))
        return "".join(f"<{tag}{mark}>{escape(str(cell))}</{tag}>" for mark, cell in zip(marks, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    top = f"<thead><tr>{row(head, 'th')}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>' if body else ""


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e-3 else f"{value:,.4f}"


def _label(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ")


def _head(run: RunFiles) -> str:
    manifest = run.manifest
    base = manifest.get("base") or {}
    names = " + ".join(str(strategy["name"]) for strategy in manifest.get("strategies") or ())
    done = "finished" if manifest.get("finished") else "ended early"
    facts = [
        names, f"{base.get('name')} in {base.get('quantization')}", str(manifest.get("task")),
        f"{done} at step {manifest.get('step')} of {manifest.get('steps')}",
    ]  # fmt: skip
    if "seconds" in manifest:
        facts.append(f"{manifest['seconds']:,.0f} s, {manifest.get('tokens_per_second', 0):,.0f} tokens/s")
    return f'<p class="facts">{escape(" · ".join(facts))}</p>'


def _metrics(run: RunFiles) -> str:
    before, after = run.manifest.get("before") or {}, run.manifest.get("metrics") or {}
    best, higher = run.best
    rows = []
    for name in [name for name in after if name.startswith("eval_")]:
        chosen = f"{_label(name)} (selects the best, {'higher' if higher else 'lower'} is better)"
        title = chosen if name == best else _label(name)
        rows.append((title, _number(before.get(name, "–")), _number(after[name])))
    step = after.get("best_step")
    note = f"<p>The adapter is that of step {step:g}.</p>" if isinstance(step, int | float) else ""
    return _section("Metrics", _table(("", "before", "after"), rows) + note if rows else "")


def _curves(run: RunFiles) -> str:
    loss = run.curve("loss")
    lines = [("training, each step", loss), ("training, running mean", running_mean(loss))]
    figures = [chart("loss", [*lines, ("evaluation", run.curve("eval_loss"))])]
    for name in [n for n in run.curves if n.startswith("eval_") and n != "eval_loss"]:
        figures.append(chart(f"{_label(name)} of evaluations", [("", run.curve(name))], marks=True))
    return _section("Curves", _grid(figures))


def _figures(run: RunFiles) -> str:
    given = [name for name in run.curves if not name.startswith("eval_") and name not in CORE]
    own = _grid([chart(_label(name), [("", run.curve(name))]) for name in given])
    core = _grid([chart(_label(name), [("", run.curve(name))]) for name in CORE[1:]])
    return _section("What the task and the strategies log", own) + _section("Optimizer and speed", core, folded=True)


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid2">{"".join(figures)}</div>' if any(figures) else ""


def _quote(title: str, texts: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_shortened(text))}</dd>" for name, text in texts)
    return f'<div class="sample"><p>{escape(title)}</p><dl>{rows}</dl></div>'


def _shortened(text: Any) -> str:
    text = str(text)
    return text if len(text) <= TEXT else f"{text[:TEXT]}… ({len(text):,} characters)"


def _samples(run: RunFiles) -> str:
    shown = []
    last, found = _last_samples(run.directory / "samples.jsonl")
    if found:
        ranked = sorted(found, key=lambda record: float(record["reward"]))
        count = min(SAMPLES, (len(ranked) + 1) // 2)
        worst = ranked[:count] if len(ranked) > 1 else []
        for word, some in (("best", ranked[::-1][:count]), ("worst", worst)):
            for record in some:
                title = f"{word} of {len(ranked)} samples at step {last}: reward {record['reward']:.4g}"
                shown.append(_quote(title, [("prompt", record.get("prompt")), ("answer", record.get("completion"))]))
    answers = run.answers.get("answers")
    for answer in answers if isinstance(answers, list) else ():
        if isinstance(answer, dict):
            right = "as in the data" if answer.get("answer") == answer.get("reference") else "differs from the data"
            shown.append(_quote(f"evaluation at step {run.answers['step']}: {right}", answer.items()))
    return _section("Samples", "".join(shown))


def _ranks(run: RunFiles) -> str:
    """Show the ranks of an adapter whose modules have different ones, as PEFT's rank_pattern gives them."""
    try:
        config = json.loads((run.directory / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        pattern = config["rank_pattern"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    ranks = {key.removesuffix(".lora_E"): sum(v) if isinstance(v, list) else v for key, v in pattern}
    ranks = {key: rank for key, rank in ranks.items() if isinstance(rank, int)}
    most = max(ranks.values(), default=0)
    if not most:
        return ""
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="n">{rank}</td>'
        f'<td class="bar"><meter min="0" max="{most}" value="{rank}">{rank}</meter></td></tr>'
        for key, rank in ranks.items()
    )
    text = f"<p>{sum(ranks.values()):,} ranks in {len(ranks)} modules; a module that is not listed has its default.</p>"
    return _section("Ranks", f'{text}<div class="wide"><table><tbody>{rows}</tbody></table></div>', len(ranks) > 40)


def _experts(run: RunFiles) -> str:
    """Show the share of the tokens of its layer that each expert of a mixture got in training."""
    rows, loads = [], run.manifest.get("experts") or {}
    for path, shares in loads.items():
        even = [float(share) * len(shares) for share in shares]
        cells = "".join(
            f'<rect x="{expert}" opacity="{min(times / 2, 1):.2f}"><title>expert {expert}: {share:.2%}</title></rect>'
            for expert, (share, times) in enumerate(zip(shares, even, strict=True))
        )
        numbers = "".join(
            f'<td class="n">{text}</td>' for text in (f"{min(even):.2f}", f"{max(even):.2f}", even.count(0))
        )
        strip = f'<svg class="load" viewBox="0 0 {len(even)} 1" preserveAspectRatio="none">{cells}</svg>'
        rows.append(f"<tr><td>{escape(path)}</td>{numbers}<td>{strip}</td></tr>")
    if not rows:
        return ""
    names = ("least, × even", "most, × even", "without tokens")
    head = "".join(f'<th class="n">{name}</th>' for name in names)
    text = (
        "<p>Each expert's share of the tokens of its layer in training, first to last: blank is none, half tone "
        "an even share, full tone twice that or more.</p>"
    )
    table = f"<thead><tr><th></th>{head}<th>experts</th></tr></thead><tbody>{''.join(rows)}</tbody>"
    return _section("Load of the experts", f'{text}<div class="wide"><table>{table}</table></div>', len(rows) > 40)


def _composition(run: RunFiles) -> str:
    strategies = run.manifest.get("strategies") or ()
    order = _table(
        ("resolved order", "options"),
        [
            (f"{number}. {s['name']}", ", ".join(f"{k}: {_plain(v)}" for k, v in s["options"].items()))
            for number, s in enumerate(strategies, 1)
        ],
        words=2,
    )
    costs = sorted(run.manifest.get("hooks") or (), key=lambda cost: -float(cost.get("own_seconds", 0)))[:COSTS]
    rows = [(c["owner"], c["hook"], f"{c['calls']:,}", f"{c['own_seconds']:.3f} s") for c in costs]
    head = ("owner", "hook, most expensive first", "calls", "own time")
    return _section("Composition", order + _table(head, rows, words=2))


def _data(run: RunFiles) -> str:
    parts = []
    examples = run.manifest.get("examples") or {}
    total = sum(int(data.get("tokens", 0)) for data in examples.values()) or 1
    rows = []
    for name, data in examples.items():
        dropped = sum(data["dropped"].values()) + sum(data["skipped"].values())
        rows.append(
            (name, data["path"], data["format"], f"{data['examples']:,}", f"{data['tokens']:,}",
            f"{data['tokens'] / total:.1%}", f"{data['labels'] / max(data['tokens'], 1):.1%}",
            f"{data['truncated']:,}", f"{dropped:,}")
        )  # fmt: skip
        parts += [f"<li>{escape(str(note))}</li>" for note in data["notes"]]
    head = ("", "data", "format", "examples", "tokens", "share", "with a loss", "truncated", "left out")
    notes = f"<ul>{''.join(parts)}</ul>" if parts else ""
    return _section("Data", _table(head, rows, words=3) + notes)


def _plan(run: RunFiles) -> str:
    manifest, rows = run.manifest, []
    planned = manifest.get("planned") or {}
    peak = manifest.get("peak_memory_bytes")
    if planned:
        cuda = str(manifest.get("device", "")).startswith("cuda")
        memory = planned["memory"]["peak_bytes"] if cuda else planned["host"]["peak_bytes"]
        seconds = planned["time"]["seconds"]
        steps = sum(float(c["seconds"]) for c in manifest.get("hooks") or () if c["hook"] == "steps")
        span = "not estimated" if seconds is None else f"{seconds[0]:,.0f} to {seconds[1]:,.0f} s"
        rows = [
            ("peak memory", f"{memory / 2**30:.2f} GiB", f"{(peak or 0) / 2**30:.2f} GiB"),
            ("time of the steps", span, f"{steps:,.0f} s"),
        ]
        return _section("Plan and run", _table(("", "planned", "taken"), rows))
    text = f"Peak memory {peak / 2**30:.2f} GiB; not planned, since memory was ample." if peak else ""
    return _section("Plan and run", f"<p>{text}</p>" if text else "")


def _environment(run: RunFiles) -> str:
    manifest = run.manifest
    rows = [("budwood", manifest.get("budwood")), ("python", manifest.get("python"))]
    rows += list((manifest.get("versions") or {}).items())
    names = ("device", "precision", "processes", "seed", "packed")
    rows += [(name, manifest[name]) for name in names if name in manifest]
    rows.append(("base's fingerprint", (manifest.get("base") or {}).get("fingerprint")))
    rows += [(f"lost {name}", count) for name, count in (manifest.get("lost") or {}).items()]
    return _section("Versions and machine", _table((), rows, words=2), folded=True)


def _recipe(run: RunFiles) -> str:
    return _section("Recipe", f"<pre>{escape(dump(run.recipe))}</pre>" if run.recipe else "", folded=True)


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list | str) else str(value)


def _last_samples(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the last step in samples.jsonl and its records with a reward; lines that are no records are left out."""
    last, found = 0, list[dict[str, Any]]()
    try:
        with path.open("rb") as file:
            for record in records(file):
                if not isinstance(record.get("reward"), int | float):
                    continue
                if record["step"] != last:
                    last, found = record["step"], []
                found.append(record)
    except OSError:
        return 0, []
    return last, found
