"""`budwood data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer


def data(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON).")],
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="Override a value of the recipe."),
    ] = None,
    samples: Annotated[int, typer.Option("-n", "--samples", min=0, help="Number of examples to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what training will see: examples with their loss mask, lengths, and what is truncated or dropped."""
    from rich.console import Console

    from budwood.contract.loading import create
    from budwood.data.build import build_examples
    from budwood.data.display import make_report, show_report
    from budwood.data.packing import plan_epoch
    from budwood.model.checkpoint import one_revision
    from budwood.recipe.data import encoding_options, recipe_tokenizer
    from budwood.recipe.schema import load_recipe

    loaded = load_recipe(recipe, override or [])
    task = create(loaded.base.task, "budwood.tasks")
    with one_revision(loaded.base.model, loaded.base.revision):
        tokenizer = recipe_tokenizer(loaded) if task.needs_tokenizer else None
    options = {"tokenizer": tokenizer, "task": task, **encoding_options(loaded)}
    train_data = build_examples(loaded.data.train, **options)
    eval_data = None
    if loaded.data.eval is not None:
        eval_data = build_examples(loaded.data.eval, **options, labels=train_data.labels or None)
    train = loaded.train
    batches = plan_epoch(train_data.lengths, train.seed, 0, train.batch_tokens, train.batch_examples, train_data.groups)
    report = make_report(train_data, eval_data, task, tokenizer, samples, len(batches))
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        show_report(report, Console(highlight=False))
