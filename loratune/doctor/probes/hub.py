"""Whether the hub answers, takes the token, and has the base."""

from __future__ import annotations

import fnmatch

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

from loratune.doctor.facts import HubFacts, Token
from loratune.errors import hub_reason_of
from loratune.model.files import BESIDE_A_BASE, HUB_FILES

SECONDS = 15
"""How long an answer may take."""


def hub_facts(base: str | None, revision: str | None) -> HubFacts:
    """Ask the hub who the token's owner is, if there is a token, and for the base's files.

    Args:
        base: hub id of a base that is not on this machine.
        revision: its branch, tag or commit.
    """
    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return HubFacts(endpoint, True, "", "not tried", None, "")
    try:
        get_session().head(endpoint, timeout=SECONDS)
    except Exception as error:  # each HTTP library has its own exceptions
        return HubFacts(endpoint, False, hub_reason_of(error), "not tried", None, "")
    base_bytes, base_reason = _ask_for(base, revision) if base else (None, "")
    return HubFacts(endpoint, False, "", _token(), base_bytes, base_reason)


def _token() -> Token:
    if not get_token():
        return "none"
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        return "refused" if error.response.status_code in (401, 403) else "not tried"
    except Exception:
        return "not tried"
    return "accepted"


def _ask_for(base: str, revision: str | None) -> tuple[int | None, str]:
    """Return the size of the files that would be downloaded, or why they cannot be."""
    try:
        api = HfApi()
        api.auth_check(base)  # a gated model is described to everyone, and downloaded by those with access
        files = api.model_info(base, revision=revision, files_metadata=True, timeout=SECONDS).siblings or []
    except Exception as error:
        return None, hub_reason_of(error)
    wanted = [file for file in files if _matches(file.rfilename, HUB_FILES)]
    return sum(file.size or 0 for file in wanted if not _matches(file.rfilename, BESIDE_A_BASE)), ""


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
