"""Model folders on the Hugging Face hub: found, fetched into its cache, and published.

The cache, its place (``HF_HOME``), offline mode (``HF_HUB_OFFLINE=1``), tokens (``hf auth login``)
and the address of the hub (``HF_ENDPOINT``) are those of huggingface_hub. Of a repository only
JSON, safetensors and the model card are fetched, whatever else lies in it: nothing that could run.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rest_lightning.errors import UserError, note
from rest_lightning.media.files import restore_folder, sha256_of

CARD_FILE = "README.md"
PART_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
MODEL_PATTERNS = ("model_index.json", CARD_FILE, *(f"*/{name}" for name in PART_PATTERNS))
_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def find_folder(
    source: str | os.PathLike[str],
    patterns: tuple[str, ...] = MODEL_PATTERNS,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Returns the folder of a model: one of this machine as it is, or one of the hub in its cache.

    Args:
        source: a folder, or ``org/name`` or ``org/name@revision`` on the hub where there is no such
            folder.
        patterns: files to fetch.
        revision: branch, tag or commit on the hub; None takes ``main``.
        token, cache_dir, local_files_only, force_download: as ``snapshot_download`` of
            huggingface_hub has them.

    Raises:
        UserError: no such model or revision, no access to it, no network and nothing in the cache,
            or a file that came damaged. A folder that is not there is returned all the same, unless
            its name could be one of the hub.
    """
    path, match = restore_folder(source), _ID.fullmatch(os.fspath(source))
    if path.exists() or match is None:
        if revision is not None:
            raise UserError(
                f"expected org/name on the hub with a revision, got {path}: leave the revision out "
                "for a folder"
            )
        return path
    if revision is not None and match["revision"] is not None:
        raise UserError(
            f"expected one revision, got {match['revision']} and {revision}: leave one out"
        )
    from huggingface_hub import snapshot_download

    repo_id, revision = match["id"], revision or match["revision"]
    started_s = time.time()
    with _told(repo_id, revision):
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
                allow_patterns=list(patterns),
                library_name="rest_lightning",
            )
        )
    _check_new_files(folder, started_s)
    return folder


def publish(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a talking head",
) -> str:
    """Uploads a model folder in one commit; files of an older version that it no longer has are
    removed in the same commit. The repository is made where there is none.

    Args:
        folder: with ``model_index.json`` and a card that names a licence.
        repo_id: ``org/name``.
        revision: branch; None takes ``main``.
        private: of a repository that is made; None takes the account's default.
        token: as huggingface_hub has it; None takes that of ``hf auth login``.
        commit_message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        UserError: a card without a licence, no access, or no network.
    """
    if _ID.fullmatch(repo_id) is None or "@" in repo_id:
        raise UserError(f"expected a name such as org/name, got {repo_id}")
    if licence_of(folder) is None:
        raise UserError(
            f"expected a licence in the model's card, got none for {repo_id}: name one with "
            "license=, such as 'cc-by-4.0', or `license:` at the head of the card"
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="rest_lightning")
    with _told(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=list(MODEL_PATTERNS),
            delete_patterns=list(MODEL_PATTERNS),
        )
    return str(commit.commit_url)


def licence_of(folder: Path) -> str | None:
    """Returns the licence that a folder's card names; None for none, or without a card.

    Raises:
        UserError: a card whose head is not YAML.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        found = (metadata_load(path) or {}).get("license")
    except (YAMLError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: expected YAML between the two lines of dashes, got {_one_line(error)}: "
            "write the card anew"
        ) from error
    return str(found) if found else None


def note_licence(folder: Path, source: str | os.PathLike[str]) -> None:
    """Tells where a model of the hub has a card without a licence, or none."""
    if licence_of(folder) is None:
        note(
            f"the card of {os.fspath(source)} names no licence: ask its author what you may do "
            "with it"
        )


def is_cached(folder: Path) -> bool:
    """Whether a folder is a snapshot in a cache of huggingface_hub."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def _check_new_files(folder: Path, started_s: float) -> None:
    """Files that were fetched just now are what the hub's hash says: the cache names them by it."""
    for file in folder.rglob("*.safetensors"):
        blob = file.resolve()
        is_new = blob.stat().st_mtime >= started_s - 2  # file systems keep whole or even seconds
        if is_new and _SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
            blob.unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            raise UserError(
                f"{file}: expected the file that the hub describes, got another (it came damaged "
                "and was removed): fetch it again"
            )


@contextmanager
def _told(repo_id: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub's client as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client raises errors of several libraries
        raise UserError(_explain(error, repo_id, revision)) from error


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"expected a branch, tag or commit of {repo_id}, got {revision}: look at its history "
            "on the hub"
        )
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"expected access to {repo_id}, got refused by the hub: accept its terms on its page, "
            "and `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.LocalTokenNotFoundError) or (
        status == 401
    ):
        return (
            f"expected a model folder or a model on the hub, got {repo_id}: neither is there (or "
            "it is private: `hf auth login`)"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"expected the model {repo_id}, got no folder of that name and no whole copy in the "
            f"cache; {_why_unreachable(error)}"
        )
    return f"expected the hub to answer for {repo_id}, got {_one_line(error)}: try again later"


def _why_unreachable(error: Any) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it to fetch"
    if error.__cause__ is None:
        return "only local files were asked for"
    return "no answer from the hub: try again with a network"


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
