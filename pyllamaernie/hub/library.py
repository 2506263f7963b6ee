"""huggingface_hub, imported when it is needed, and what its errors are here.

Its releases 0, 1 and 2 raise the errors of different HTTP packages; those are told by the package they come from.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyllamaernie.errors import DiskSpaceError, HubError, OfflineError, PyllamaernieError

INSTALL = "pip install 'pyllamaernie[hub]'"
_HTTP_PACKAGES = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"}


def library(what: str = "a model by its name") -> Any:
    """The package. Raises: HubError that says how to install it."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise HubError(f"{what}: no such file, and for a name on a hub huggingface_hub is needed: {INSTALL}")
    return importlib.import_module("huggingface_hub")


def module(name: str) -> Any:
    """One of its modules."""
    library()
    return importlib.import_module(f"huggingface_hub.{name}")


def quiet_unless_terminal(what: str) -> None:
    """No progress bars of huggingface_hub where nobody watches."""
    if not sys.stderr.isatty():
        library(what)
        module("utils").disable_progress_bars()


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where files are kept: the given folder, else huggingface_hub's own (HF_HUB_CACHE, HF_HOME)."""
    return Path(module("constants").HF_HUB_CACHE if cache_dir is None else cache_dir)


def endpoint() -> str:
    """The hub that is asked (HF_ENDPOINT)."""
    return str(module("constants").ENDPOINT)


@contextmanager
def translated(what: str, repo: str) -> Iterator[None]:
    """Errors of huggingface_hub as ours: OfflineError, HubError, DiskSpaceError."""
    try:
        yield
    except PyllamaernieError:
        raise
    except Exception as error:
        ours = _ours(error, what, repo)
        if ours is None:
            raise
        raise ours from error


def _ours(error: Exception, what: str, repo: str) -> PyllamaernieError | None:
    known = module("errors")
    online = f"`pyllamaernie pull {what}` fetches it, and goes on where it stopped, when there is a network"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, known.OfflineModeIsEnabled):
        return OfflineError(f"{what} is not on this disk, and HF_HUB_OFFLINE is set; without it {online}")
    if isinstance(error, known.GatedRepoError):
        return HubError(
            f"{repo}: its owner lets in who asked; accept its terms at {endpoint()}/{repo}, and set HF_TOKEN or log in "
            "with `hf auth login`"
        )
    if isinstance(error, known.RepositoryNotFoundError):
        return HubError(
            f"{repo}: no such path here and no such repository at {endpoint()}; if it is private, set HF_TOKEN or log "
            "in with `hf auth login`"
        )
    if isinstance(error, known.HFValidationError):
        return HubError(f"{repo}: not the name of a repository ({error})")
    offline_kind = isinstance(error, known.LocalEntryNotFoundError) or _package(error) in _HTTP_PACKAGES
    if (status is None and offline_kind) or (status is not None and (status >= 500 or status in (408, 429))):
        reason = type(error).__name__ if status is None else f"HTTP {status}"
        return OfflineError(f"{what} is not whole on this disk, and {endpoint()} did not give it ({reason}); {online}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DiskSpaceError(f"{what}: the disk is full; what came is kept, and {online}")
    if status is not None:
        return HubError(f"{repo}: {endpoint()} answered HTTP {status} ({_first_line(error)})")
    if isinstance(error, OSError) and "onsistency check" in str(error):
        return OfflineError(f"{what}: the connection ended early; {online}")
    return None


def _package(error: Exception) -> str:
    return type(error).__module__.split(".")[0]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
