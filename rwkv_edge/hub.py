"""Checkpoints by their name on the Hugging Face Hub: ``hf://OWNER/NAME[@REVISION][/FILE]``.

Files are fetched by the package `huggingface_hub` (extra 'hub') into its cache, so its environment variables count:
HF_HOME, HF_TOKEN, HF_ENDPOINT, and HF_HUB_OFFLINE, which lets only what is in the cache be used.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from rwkv_edge.errors import CheckpointError, InputError, MissingDependencyError

_PREFIX = re.compile(r"hf:/+")  # one slash where a path library has joined two
_FORM = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")
_INDEXES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD = r"-\d{5}-of-\d{5}\."
_BESIDE = ("config.json", "adapter_config.json")  # small, and read by some layouts
_WEIGHTS = (".pth", ".pt", ".safetensors", ".st", ".bin")
_MOST_NAMES = 8  # in a message


@dataclass(frozen=True)
class HubPath:
    """A repository of models, a branch, tag or commit in it, and one file or None for a folder of transformers."""

    repo: str
    revision: str
    file: str | None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf://{self.repo}{revision}" + (f"/{self.file}" if self.file else "")


def is_hub_path(path: str | Path) -> bool:
    """Whether a path begins with ``hf://``."""
    return bool(_PREFIX.match(str(path)))


def hub_path(path: str | Path) -> HubPath:
    """The parts of ``hf://OWNER/NAME[@REVISION][/FILE]``; a revision with slashes is written with %2F.

    Raises:
        InputError: another form.
    """
    found = _FORM.fullmatch(_PREFIX.sub("", str(path), count=1).rstrip("/"))
    if not found:
        written = _PREFIX.sub("hf://", str(path), count=1)  # a path has lost a slash
        raise InputError(f"a checkpoint on the hub is hf://OWNER/NAME[@REVISION][/FILE], not '{written}'")
    return HubPath(found["repo"], unquote(found["revision"] or "main"), found["file"])


def checkpoint_name(path: Path) -> str:
    """What to call what is made of a checkpoint: the name of its file, folder or repository."""
    if is_hub_path(path):
        place = hub_path(path)
        return Path(place.file).stem if place.file else place.repo.partition("/")[2]
    return path.resolve().name if path.is_dir() else path.stem


def local_checkpoint(path: str | Path) -> Path:
    """``path``, or where the file or folder that it names on the hub lies in the cache, fetched now if need be.

    Raises:
        InputError: a name of another form.
        CheckpointError: it is not there, may not be read, or cannot be reached; the message says which.
        MissingDependencyError: `huggingface_hub` is not installed.
    """
    if not is_hub_path(path):
        return Path(path)
    place = hub_path(path)
    try:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: F401
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", "hub", f"fetching {place}") from error
    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # imports reset it, hence all of them
    with _hub_errors(place):
        if place.file:
            return Path(hf_hub_download(place.repo, place.file, revision=place.revision))
        return _folder(place)


def _folder(place: HubPath) -> Path:
    """The snapshot with the weights of a repository, and nothing else of it."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = HfApi().list_repo_files(place.repo, revision=place.revision)
    except HfHubHTTPError:
        raise
    except Exception as error:  # offline, or no connection: HTTP libraries differ by version
        return _cached_folder(place, error)
    wanted = _wanted(place, names)
    folder = snapshot_download(place.repo, revision=place.revision, allow_patterns=wanted)
    return Path(folder) if len(wanted) > 1 or wanted[0] in _INDEXES else Path(folder) / wanted[0]


def _cached_folder(place: HubPath, reason: Exception) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    for name in _INDEXES:
        found = try_to_load_from_cache(place.repo, name, revision=place.revision)
        if isinstance(found, str):
            return Path(found).parent
    raise LocalEntryNotFoundError("no weights in the cache") from reason


def _wanted(place: HubPath, names: Sequence[str]) -> list[str]:
    """The files of the one model that a repository holds.

    Raises:
        CheckpointError: it holds none, or several.
    """
    index = next((name for name in _INDEXES if name in names), None)
    if index is None:
        weights = weights_among(names)
        if len(weights) != 1:
            raise CheckpointError(f"{place} holds {_listed(weights)}; name one: hf://{place.repo}/FILE")
        return weights
    beside = [name for name in _BESIDE if name in names]
    stem, suffix = index.removesuffix(".index.json").rsplit(".", 1)
    shards = [name for name in names if re.fullmatch(re.escape(stem) + _SHARD + suffix, name)]
    return [index, *(shards if index.endswith(".json") else ()), *beside]


def weights_among(names: Sequence[str]) -> list[str]:
    """The names that end like files of weights."""
    return [name for name in names if name.lower().endswith(_WEIGHTS)]


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "no weights"
    return (
        f"{len(names)} files of weights ({', '.join(names[:_MOST_NAMES])}{', …' if len(names) > _MOST_NAMES else ''})"
    )


@contextlib.contextmanager
def _hub_errors(place: HubPath) -> Iterator[None]:
    """What the package raises, as one sentence."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (CheckpointError, InputError):
        raise
    except HFValidationError as error:
        raise InputError(f"{place} is no name on the hub: {_line(error)}") from error
    except Exception as error:  # those of several HTTP libraries, by version, share no other base
        raise CheckpointError(f"{place} {_problem(error, place)}") from error


def _problem(error: Exception, place: HubPath) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"asks who wants it: accept its terms at {constants.ENDPOINT}/{place.repo}, then run 'hf auth login'"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"is not at {constants.ENDPOINT}: there is no repository '{place.repo}', or it is private; "
            "check the name, or run 'hf auth login'"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"is not there: the repository has no branch, tag or commit '{place.revision}'"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return f"is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it"
        cause = error.__cause__ or error
        return f"is not in the cache, and {constants.ENDPOINT} cannot be reached ({_line(cause)}); check the connection"
    if isinstance(error, errors.EntryNotFoundError):
        return f"is not there: the repository holds {_listed(_remote_weights(place))}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"may not be read with your token ({status}); run 'hf auth login'"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}"
    return f"could not be fetched: {_line(error)}; try again"


def _remote_weights(place: HubPath) -> list[str]:
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # only for the message
        return weights_among(HfApi().list_repo_files(place.repo, revision=place.revision))
    return []


def _line(error: BaseException | Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
