"""`budwood data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from budwood.cli.given import read_given
from budwood.cli.options import Override
from budwood.cli.streams import echo_json
from budwood.garbage import uncollected


def data(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML or JSON), or a data file together with --base.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model for a data file: folder or hub name.")] = None,
    override: Override = None,
    samples: Annotated[int, typer.Option("-n", "--samples", min=0, help="Number of examples to show.")] = 3,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE.png", help="Draw the samples in a picture: tasks on images.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what training will see: examples with their loss mask, lengths, and what is truncated or dropped."""
    from rich.console import Console

    from budwood.model.checkpoint import one_revision
    from budwood.model.checks import check_base
    from budwood.recipe.schema import build_composition
    from budwood.training.preflight import check_data

    loaded = read_given(recipe, base, override or [])
    strategies = build_composition(loaded).strategies if base is None else []
    check_data(loaded, strategies)  # before torch is imported, which takes seconds
    with one_revision(loaded.base.model, loaded.base.revision):
        check_base(loaded.base.model, loaded.base.quantization, loaded.base.trust_remote_code)
    with uncollected():
        from budwood.cli.streams import Output
        from budwood.data.build import build_examples
        from budwood.data.display import make_report, show_report, write_sheet
        from budwood.data.packing import plan_epoch
        from budwood.data.sources import locate
        from budwood.data.unused import columns_read
        from budwood.data.use import check_use
        from budwood.model.limits import check_fits, default_length
        from budwood.recipe.data import (
            chat_note,
            encoding_options,
            read_task_base,
            recipe_limits,
            recipe_task,
            recipe_tokenizer,
        )
        from budwood.training.encoding import encoding
        from budwood.training.run_data import choose_for, split_held_out

    task = recipe_task(loaded)
    with one_revision(loaded.base.model, loaded.base.revision):
        read_task_base(task, loaded)
        tokenizer = recipe_tokenizer(loaded) if task.needs_tokenizer else None
        model = recipe_limits(loaded, task.auto_class, tokenizer)
    loaded = loaded.with_length(default_length(model))
    options = {"tokenizer": tokenizer, "task": task, "read": columns_read(strategies), **encoding_options(loaded)}
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    found = locate(loaded.data.train)
    with encoding(found, console) as progress:
        train_data = build_examples(found, **options, progress=progress)
    eval_data = None
    if loaded.data.evaluated is not None:
        found = locate(loaded.data.evaluated)
        with encoding(found, console) as progress:
            eval_data = build_examples(found, **options, labels=train_data.labels or None, progress=progress)
    for examples in (train_data, eval_data):
        if examples is not None:
            check_use(examples.path, examples, [task, *strategies], complete=base is None)
            check_fits(examples, model, tokenizer, loaded.base.model)
    notes = [chat_note(loaded, train_data, tokenizer)]
    if loaded.data.holds_out:
        held = split_held_out(loaded, train_data)
        train_data, eval_data = held.split(train_data)
        notes.append(held.note)
    train, _ = choose_for(loaded, train_data, model, eval_data is not None)
    batches = plan_epoch(train_data.lengths, train.seed, 0, train.batch_tokens, train.batch_examples, train_data.groups)
    if sheet is not None:
        write_sheet(sheet, train_data, task, samples)
    report = make_report(train_data, eval_data, task, tokenizer, samples, len(batches), list(filter(None, notes)))
    if as_json:
        echo_json(report)
    else:
        show_report(report, Output(highlight=False))
