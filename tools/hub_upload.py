"""Uploads a bundle to the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..engines.bundle import Bundle
from ..engines.hub import REPO_ID
from ..engines.manifest import MANIFEST_NAME
from ..errors import DownloadError, NetworkError, RequestError, one_line
from .bundle_card import write_card
from .verify_figures import VerifyFigures


def push_bundle(bundle: Bundle, repo_id: str, *, private: bool = False, figures: VerifyFigures | None = None) -> str:
    """Upload a bundle and its model card as one commit; the repository is made if it is not there.

    Files that the Hub has already, also those of an upload that was interrupted, are not sent again.

    Args:
        bundle: the bundle; every file is read and compared with its hash.
        repo_id: ``owner/name``.
        private: whether a new repository is private.
        figures: those of `hypersd verify` for the card.

    Returns:
        The address of the commit.

    Raises:
        RequestError: ``repo_id`` is no repository's name, or the weights are random.
        BundleError: a file is missing or altered.
        DownloadError: the Hub refused the request.
        NetworkError: the Hub could not be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not REPO_ID.fullmatch(repo_id):
        raise RequestError(f"{repo_id!r} is no repository on the Hub: expected OWNER/NAME")
    if bundle.manifest.random_weights:
        raise RequestError(f"{bundle.root} has random weights, its images are noise: push a bundle of real ones")
    bundle = Bundle.load(bundle.root, hashes=True)
    plans = bundle.plan_files()
    names = [name for name in bundle.manifest.files if name not in plans or bundle.path(name).is_file()]
    with _explained(repo_id):
        api = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        card = write_card(repo_id, bundle.manifest, _licence(api, bundle), figures)
        files = {name: bundle.path(name) for name in names} | {MANIFEST_NAME: bundle.root / MANIFEST_NAME}
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        message = f"{bundle.manifest.checkpoint}, exported with hypersd"
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)


def _licence(api: Any, bundle: Bundle) -> str | None:
    """The licence of the base, from its model card on the Hub."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    base = bundle.manifest.origin.base
    if not REPO_ID.fullmatch(base):
        return None
    try:
        card = api.model_info(base).card_data
    except HTTPError:  # a base that is no longer there
        return None
    return card.get("license") if card is not None else None


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Say the Hub's error in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    log_in = "log in with `hf auth login` or set HF_TOKEN, to a token that may write there"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise NetworkError(f"HF_HUB_OFFLINE is set: unset it to push to {repo_id}") from error
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise DownloadError(f"cannot push to {repo_id} ({one_line(error)}): check the name, and {log_in}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise DownloadError(f"the Hub refused to write to {repo_id} ({status}): {log_in}") from error
        raise NetworkError(
            f"{constants.ENDPOINT} answered {status} to the push to {repo_id}: run the same command again"
        ) from error
    except (HTTPError, ConnectionError, RuntimeError) as error:  # an object that could not be sent is a RuntimeError
        remedy = "the same command continues with the files that are missing"
        raise NetworkError(f"the push to {repo_id} was interrupted ({one_line(error)}): {remedy}") from error
