"""Translates errors of the hub into Budwood's own, for models and datasets alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from budwood.errors import InputError, ResourceError, first_line
from budwood.untrusted.redaction import shorten

_LOCAL = {"base": "folder", "dataset": "file or folder"}
"""The local counterpart of a repository."""


@contextmanager
def hub_errors(noun: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Translate download errors raised in the block.

    Args:
        noun: "base" or "dataset".
        name: the name on the hub.
        revision: the requested revision, if any.

    Raises:
        InputError: there is no such repository or revision.
        ResourceError: the repository is gated, the hub cannot be reached, or the download fails.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    name, local = shorten(name), _LOCAL[noun]
    shown = f"'{name}'" if revision is None else f"'{name}' at revision '{shorten(revision)}'"
    try:
        yield
    except hub.GatedRepoError as error:
        raise ResourceError(
            f"{noun} '{name}' is gated: accept its terms on huggingface.co, then `hf auth login` or set HF_TOKEN."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise InputError(f"{noun} '{name}' has no revision '{shorten(str(revision))}' on the hub.") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise InputError(f"{noun} '{name}' is neither a local {local} nor on the hub: check the name.") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ResourceError(
            f"{noun} {shown} is neither a local {local} nor in the hub's cache, and {reason}: "
            f"give a {local}, or go online and download it once."
        ) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise ResourceError(f"{noun} {shown} cannot be downloaded: {first_line(error)}") from error
