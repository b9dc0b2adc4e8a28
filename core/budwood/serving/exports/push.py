"""Uploads an export to the hub."""

from __future__ import annotations

from pathlib import Path

from budwood.errors import InputError, ResourceError, first_line
from budwood.model.checkpoint import HUB_NAME
from budwood.untrusted.redaction import shorten


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        InputError: it is not OWNER/NAME.
    """
    if not HUB_NAME.fullmatch(name) or "/" not in name:
        raise InputError(f"--push {shorten(name)}: give a repository of the hub, OWNER/NAME.")


def upload(folder: Path, repository: str) -> str:
    """Upload a folder to a repository, which is created, private, if it does not exist; return its address.

    Raises:
        ResourceError: the hub cannot be reached, or refuses; the folder stays.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    later = f"the export is complete in {folder}; push it later: hf upload {repository} {folder}"
    if constants.HF_HUB_OFFLINE:
        raise ResourceError(f"--push {repository}: HF_HUB_OFFLINE is set; {later}")
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except OfflineModeIsEnabled as error:
        raise ResourceError(f"--push {repository}: the hub is offline; {later}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ResourceError(f"--push {repository}: {first_line(error)}; {later}") from error
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "requests")):
            raise ResourceError(f"--push {repository}: the hub cannot be reached; {later}") from error
        raise
    return str(address)
