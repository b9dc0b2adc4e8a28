"""`budwood plugins`: lists installed plugins without importing them, or describes one."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from budwood.cli.streams import echo, echo_json

GROUPS = {
    "strategies": "budwood",
    "tasks": "budwood.tasks",
    "formats": "budwood.formats",
    "quantizers": "budwood.quantizers",
    "attacks": "budwood.attacks",
    "rewards": "budwood.rewards",
}


def plugins(
    name: Annotated[str | None, typer.Argument(help="A plugin to import and describe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List installed strategies, tasks, data formats, quantisers, attacks and rewards, or describe one."""
    if name is None:
        _list(as_json)
    else:
        _describe(name, as_json)


def _list(as_json: bool) -> None:
    from budwood.contract.discovery import installed

    plugins = {
        kind: [entry for entries in installed(group).values() for entry in entries] for kind, group in GROUPS.items()
    }
    if as_json:
        fields = ("name", "distribution", "version", "summary")
        echo_json({kind: [{f: getattr(e, f) for f in fields} for e in plugins[kind]] for kind in GROUPS}, indent=2)
        return
    name_width = max(len(entry.name) for entries in plugins.values() for entry in entries)
    owner_width = max(len(entry.owner) for entries in plugins.values() for entry in entries)
    for kind, entries in plugins.items():
        echo(kind)
        for entry in entries:
            clash = "  (installed twice: uninstall one)" if [e.name for e in entries].count(entry.name) > 1 else ""
            echo(f"  {entry.name:{name_width}}  {entry.owner:{owner_width}}  {entry.summary}{clash}".rstrip())
    echo("`budwood plugins NAME` shows hooks and options.", err=True)


def _describe(name: str, as_json: bool) -> None:
    from budwood.contract.discovery import absence, find, installed
    from budwood.errors import InputError, did_you_mean

    kinds = [kind for kind, group in GROUPS.items() if name in installed(group)]
    if not kinds:
        if why := absence(name):
            raise InputError(f"'{name}' is not offered: it {why}.")
        known = [known for group in GROUPS.values() for known in installed(group)]
        raise InputError(f"no plugin is called '{name}'.{did_you_mean(name, known)} See `budwood plugins`.")
    records = []
    for kind in kinds:
        entry = find(name, GROUPS[kind])
        record: dict[str, Any] = {
            "kind": kind,
            "name": name,
            "distribution": entry.distribution,
            "version": entry.version,
            "object": entry.value,
            "summary": entry.summary,
        }
        if kind == "strategies":
            record |= _strategy(name)
        else:
            record |= _options(entry.load())
        records.append(record)
    if as_json:
        echo_json(records[0] if len(records) == 1 else records, indent=2)
        return
    for record in records:
        _show(record)


def _strategy(name: str) -> dict[str, Any]:
    """Import a strategy and return what it declares."""
    from budwood.contract.loading import HOOKS, load_strategy
    from budwood.recipe.reference import describe_fields, strategy_schema

    cls, _ = load_strategy(name)
    declared = ("slots", "provides", "requires", "conflicts", "before", "after")
    implementations = {hook: getattr(getattr(cls, hook, None), "budwood_impl", None) for hook in HOOKS}
    return {
        **{key: list(getattr(cls, key)) for key in declared},
        "api": cls.api,
        "hooks": [
            {"name": hook, "wraps": implementation["wrapper"]}
            for hook, implementation in implementations.items()
            if implementation
        ],
        "options": [field.as_dict() for field in describe_fields(strategy_schema(name)[0])],
    }


def _options(loaded: Any) -> dict[str, Any]:
    """Return the options of a plugin that is not a strategy, if it has any."""
    from budwood.recipe.reference import describe_fields

    model = getattr(loaded, "Options", None)
    return {"options": [field.as_dict() for field in describe_fields(model.model_json_schema())]} if model else {}


def _show(record: dict[str, Any]) -> None:
    echo(f"{record['name']}: {record['summary'] or record['object']}")
    echo(f"  {record['distribution']} {record['version']}, {record['object']}")
    for key in ("slots", "provides", "requires", "conflicts", "before", "after"):
        if record.get(key):
            echo(f"  {key}: {', '.join(record[key])}")
    if record.get("hooks"):
        hooks = [hook["name"] + (" (wraps)" if hook["wraps"] else "") for hook in record["hooks"]]
        echo(f"  hooks: {', '.join(hooks)}")
    for option in record.get("options", ()):
        constraint = f", {option['constraint']}" if option["constraint"] else ""
        default = f"default {json.dumps(option['default'])}" if option["default"] is not None else "optional"
        default = "required" if option["required"] else default
        echo(f"  {option['name']}: {option['type']}{constraint}; {default}")
        if option["description"]:
            echo(f"      {option['description']}")
