"""`budwood serve` and `budwood token`."""

from __future__ import annotations

import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from budwood.cli.options import AnyBase, Device, Precision
from budwood.cli.streams import echo
from budwood.garbage import uncollected

if TYPE_CHECKING:
    from budwood.serving.http.settings import Address

NAME = r"[A-Za-z0-9_./-]{1,128}"
EXTRA = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


def serve(
    base: AnyBase,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", metavar="DIR", help="Folder whose subfolders are adapters, or runs.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine need --tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the base. Default: its name.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens of clients and administrator; see `budwood token`.")
    ] = None,
    admin: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Where the administrator connects: path of a Unix socket, or HOST:PORT."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task, such as embedding. Default: the adapters'.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="none, int8, nf4 or fp4. Default: as the adapters were trained.")
    ] = None,
    precision: Precision = "auto",
    device: Device = "auto",
    rows: Annotated[int, typer.Option(min=1, help="Answers that are computed at once.")] = 32,
    waiting: Annotated[int, typer.Option(min=0, help="Answers that wait for a row; more are refused.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of an answer.")] = 4096,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds after which a request is ended.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for requests in flight after SIGTERM.")] = 30.0,
    adapter_mib: Annotated[
        int | None,
        typer.Option(min=1, help="MiB for adapters in memory; others are read when asked for. Default: no limit."),
    ] = None,
    prefix_mib: Annotated[int, typer.Option(min=0, help="MiB for prompts that begin alike; 0: none.")] = 256,
) -> None:
    """Serve a base and its adapters with OpenAI's API, and a page to try them."""
    _check_extra()
    from budwood.errors import InputError
    from budwood.model.checkpoint import resolve

    resolve(base, weights=False)  # a base that is not there is refused before any library is imported
    with uncollected():
        from budwood.serving.http.catalog import Root
        from budwood.serving.http.settings import Address, Limits, Settings
        from budwood.serving.http.tokens import Tokens

    place = Address(host, port)
    known = Tokens(tokens)
    admin_place = _place(admin) if admin is not None else None
    if not place.is_local and not known.needed:
        raise InputError(
            f"--host {host}: other machines could ask without a token. Make tokens with: budwood token FILE TENANT, "
            "and pass --tokens FILE; or listen at 127.0.0.1."
        )
    if admin_place is not None and not admin_place.is_local:
        raise InputError(f"--admin {admin}: the administrator connects from this machine alone: use 127.0.0.1:PORT.")
    if admin_place is not None and not known.has_admin:
        raise InputError("--admin: needs an administrator's token: budwood token FILE --admin, then --tokens FILE.")
    base_name = name or _base_name(base)
    if not re.fullmatch(NAME, base_name):
        raise InputError(f"--name {base_name[:64]!r}: use letters, digits, '_', '-', '.' and '/'.")
    root = Root(adapters) if adapters is not None else None
    limits = Limits(max_tokens=max_tokens, waiting=waiting, deadline=deadline, drain=drain)
    settings = Settings(base_name, place, admin_place, limits)
    with uncollected():
        from budwood.serving.http.server import run
        from budwood.serving.http.sockets import bound
        from budwood.serving.http.start import open_service

    _log_to_stderr()
    with bound(settings) as sockets:
        service = open_service(
            base, settings, known, root, lambda text: echo(text, err=True), task=task, quantization=quantization,
            precision=precision, device=device, max_rows=rows, prefix_bytes=prefix_mib << 20,
            adapter_bytes=None if adapter_mib is None else adapter_mib << 20,
        )  # fmt: skip

        def started() -> None:
            names = ", ".join(one.name for one in service.catalog.all()) or "none"
            echo(f"base {settings.base_name}; adapters: {names}", err=True)
            echo(f"listening at {' and '.join(sockets.places)}")
            sys.stdout.flush()

        run(service, sockets, started)


def token(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of tokens; made if there is none.")],
    tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Whom the token is for.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Make a token for the administrator.")] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An adapter that it may use; may be repeated. Default: *, all."),
    ] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Largest number of requests a minute.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Largest number of answers at a time.")] = None,
) -> None:
    """Make a token for `budwood serve`, print it once, and keep its hash in a file."""
    from budwood.errors import InputError
    from budwood.serving.http.tokens import add_token

    if admin == (tenant is not None):
        raise InputError("give a tenant's name, or --admin.")
    if admin and (adapter or per_minute or rows):
        raise InputError("--admin: has no limits; leave out --adapter, --per-minute and --rows.")
    names = adapter if adapter and "*" not in adapter else "*"
    options = {"adapters": names, "requests_per_minute": per_minute, "rows": rows}
    echo(add_token(file, tenant, **(options if tenant is not None else {})))


def _check_extra() -> None:
    from budwood.errors import ResourceError

    missing = [module for module in EXTRA if find_spec(module) is None]
    if missing:
        raise ResourceError(f"`budwood serve` needs {', '.join(missing)}: pip install 'budwood[serve]'")


def _place(text: str) -> Address:
    from budwood.errors import InputError
    from budwood.serving.http.settings import Address

    host, colon, port = text.rpartition(":")
    if not colon or "/" in text:
        return Address("", 0, text)
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--admin {text[:64]!r}: write HOST:PORT, or the path of a socket.")
    return Address(host.strip("[]"), int(port))


def _base_name(base: str) -> str:
    """Return what clients call a base: the hub's name, or that of its folder."""
    folder = Path(base)
    name = folder.resolve().name if folder.exists() else base
    return re.sub(r"[^A-Za-z0-9_./-]", "-", name) or "base"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("budwood.serve")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
