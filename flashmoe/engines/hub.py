"""Models by their names: a program's here, or the hub's, found in its cache or fetched into it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flashmoe import local_models
from flashmoe.disk.files import check_room
from flashmoe.errors import FlashMoEError

# org/name, and of a repository of GGUF files the one that is meant
_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(:(?P<file>[^:]+\.gguf))?")
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_NEEDED = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")  # of a checkpoint


class Listed(NamedTuple):
    """The files of the model that a name means."""

    repository: str
    file: str | None  # of a repository of GGUF files the one that is meant
    names: list[str]
    folder: Path | None  # where they lie, if the hub cannot be reached


def is_name(path: str | os.PathLike[str]) -> bool:
    """Is it a name on the hub: one in form, and nothing lies there?"""
    return _NAME.fullmatch(os.fspath(path)) is not None and not os.path.lexists(path)


def on_disk(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Where a model lies: `path` itself, unless it is a name and nothing lies there.

    A name by which Ollama or LM Studio keep a model stands for their file (`local_models`). A name
    on the hub, org/name or org/name:file.gguf, is fetched by huggingface_hub first, as far as its
    cache lacks it. revision: a branch, tag or commit there.
    Raises FlashMoEError when it cannot be had, or the disk has too little room, before weights
    are fetched.
    """
    if revision is None and (kept := kept_here(path)):
        return kept
    if not is_name(path):
        if revision is not None:
            raise FlashMoEError(f"revision {revision!r}: {path} is no name on the hub")
        return Path(path)
    from huggingface_hub import constants, snapshot_download

    with told(os.fspath(path), revision):
        repository, file, wanted, folder = listed(path, revision)
        if folder is None:
            planned = snapshot_download(
                repository, revision=revision, allow_patterns=wanted, dry_run=True
            )
            missing_bytes = sum(one.file_size or 0 for one in planned if one.will_download)
            check_room(Path(constants.HF_HUB_CACHE), repository, missing_bytes)
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    return folder if file is None else folder / file


def kept_here(path: str | os.PathLike[str]) -> Path | None:
    """The file of another program that keeps a model by this name, unless something lies there."""
    return None if os.path.lexists(path) else local_models.find(os.fspath(path))


def listed(path: str | os.PathLike[str], revision: str | None = None) -> Listed:
    """The files that a name on the hub means. To be called within `told`."""
    name = _NAME.fullmatch(os.fspath(path))
    assert name
    repository, file = name["repository"], name["file"]
    present, folder = _files(repository, revision, file or "config.json")
    wanted = _checkpoint(repository, present) if file is None else _gguf(file, present)
    return Listed(repository, file, wanted, folder)


def gguf_sizes(repository: str) -> dict[str, int]:
    """Bytes of each GGUF model in a repository, by its first file; none beside a checkpoint.

    Raises FlashMoEError where the hub does not tell.
    """
    with told(repository):
        sizes, _ = _files(repository, None, "*")
        if _is_checkpoint(sizes):
            return {}
        models = _ggufs(sizes)
        first = [name for name in models if not (p := _PART.search(name)) or "-00001-of-" in p[0]]
        return {name: sum(sizes[part] for part in _gguf(name, models)) for name in first}


def _files(
    repository: str, revision: str | None, sought: str
) -> tuple[dict[str, int], Path | None]:
    """Bytes of every file of a repository; without the hub, of those in the cache, and where.

    sought: one of them, without which the cache is of no use.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        found = HfApi().model_info(repository, revision=revision, files_metadata=True)
        return {file.rfilename: file.size or 0 for file in found.siblings or []}, None
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise
    except Exception:  # no network, or HF_HUB_OFFLINE: each library raises its own
        pass
    folder = Path(
        snapshot_download(
            repository, revision=revision, local_files_only=True, allow_patterns=[sought]
        )
    )
    present = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in present}, folder


def _checkpoint(repository: str, present: Collection[str]) -> list[str]:
    """The files of a checkpoint; folders hold the same weights in other forms."""
    if _is_checkpoint(present):
        return [name for name in present if "/" not in name and name.endswith(_NEEDED)]
    if ggufs := _ggufs(present):
        raise FlashMoEError(
            f"{repository} holds GGUF files: name one, such as {repository}:{ggufs[0]}"
        )
    raise FlashMoEError(f"{repository} holds no safetensors with a config.json, and no GGUF file")


def _is_checkpoint(present: Collection[str]) -> bool:
    weights = (name.endswith(".safetensors") and "/" not in name for name in present)
    return "config.json" in present and any(weights)


def _ggufs(present: Collection[str]) -> list[str]:
    """Those that hold a model that reads and writes text."""
    return [name for name in present if name.endswith(".gguf") and "mmproj" not in name]


def _gguf(file: str, present: Collection[str]) -> list[str]:
    """A GGUF file with all its parts."""
    if file not in present:
        others = ", ".join(name for name in present if name.endswith(".gguf")) or "none"
        raise FlashMoEError(f"there is no {file}; its GGUF files: {others}")
    if part := _PART.search(file):
        stem = file[: part.start()]
        return [n for n in present if n.startswith(stem) and n.endswith(f"-of-{part[1]}.gguf")]
    return [file]


@contextmanager
def told(path: str, revision: str | None = None) -> Iterator[None]:
    """What huggingface_hub raises within becomes one sentence."""
    from huggingface_hub import errors

    where = f"{path} at revision {revision}" if revision else path
    try:
        yield
    except FlashMoEError as error:
        raise FlashMoEError(f"{where}: {error}") from None
    except errors.GatedRepoError:
        why = "its owner gives it on request: ask there, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "neither a file here nor a model on the hub that you may see"
    except errors.RevisionNotFoundError:
        why = "the hub has no such revision of it"
    except errors.LocalEntryNotFoundError:
        why = "it is not in the hub's cache, and the hub cannot be reached"
    except Exception as error:  # of the network: each library raises its own
        lines = str(error).strip().splitlines() or [repr(error)]
        why = f"it cannot be fetched ({lines[0]})"
    else:
        return
    raise FlashMoEError(f"{where}: {why}")
