"""`budwood data`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from budwood.cli.given import read_given


def data(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON), or a data file together with --base.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model for a data file: folder or hub name.")] = None,
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="Override a value of the recipe."),
    ] = None,
    samples: Annotated[int, typer.Option("-n", "--samples", min=0, help="Number of examples to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what training will see: examples with their loss mask, lengths, and what is truncated or dropped."""
    from budwood.cli.streams import Output
    from budwood.contract.loading import create
    from budwood.data.build import build_examples
    from budwood.data.display import make_report, show_report
    from budwood.data.packing import plan_epoch
    from budwood.model.base import load_tokenizer, skeleton
    from budwood.model.checkpoint import one_revision
    from budwood.model.limits import check_fits, default_length

    loaded = read_given(recipe, base, override or [])
    task = create(loaded.base.task, "budwood.tasks")
    with one_revision(loaded.base.model, loaded.base.revision):
        tokenizer = load_tokenizer(loaded.base.model) if task.needs_tokenizer else None
        model = skeleton(loaded.base.model, task.auto_class, loaded.base.trust_remote_code)
    length = loaded.data.max_length or default_length(model)
    build = partial(build_examples, tokenizer=tokenizer, task=task, max_length=length)
    build = partial(build, skip_bad_rows=loaded.data.on_bad_row == "skip")
    train = build(loaded.data.train)
    other = build(loaded.data.eval, labels=train.labels or None) if loaded.data.eval is not None else None
    for examples in (train, other):
        if examples is not None:
            check_fits(examples, model, tokenizer, loaded.base.model)
    size = loaded.train
    steps = len(plan_epoch(train.lengths, size.seed, 0, size.batch_tokens, size.batch_examples, train.groups))
    report = make_report(train, other, task, tokenizer, samples, steps)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        show_report(report, Output(highlight=False))
