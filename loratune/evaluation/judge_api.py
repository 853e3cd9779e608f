"""The API of a judge: asks again where a server is busy, and without what it refuses."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any

KEYS = ("LORATUNE_JUDGE_API_KEY", "OPENAI_API_KEY")
"""Environment variables of the key, in the order in which they are looked for."""
TRIES = 3
PAUSE_SECONDS = 2.0
MOST_BYTES = 1 << 20
MOST_OF_REASON = 4096
"""Bytes of an error that are read."""
BUSY = (408, 429, 500, 502, 503, 504)
REFUSED = 400
LIMIT, NEWER_LIMIT, TEMPERATURE = "max_tokens", "max_completion_tokens", "temperature"
REFUSABLE = (LIMIT, TEMPERATURE)
"""Parameters that not every server takes: some have another name for the limit, and some no temperature."""


class _NotFollowed(urllib.request.HTTPRedirectHandler):
    """Refuses redirections, which would take the key elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class JudgeError(OSError):
    """A response of another status than that of success, with what it says."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text


class JudgeApi:
    """An OpenAI-compatible API. A parameter that it has refused is left out from then on.

    Args:
        url: base URL, such as http://127.0.0.1:8000/v1.
        model: the model's name there.
    """

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._refused: set[str] = set()

    @property
    def is_random(self) -> bool:
        """Whether it samples its replies, because it takes no temperature."""
        return TEMPERATURE in self._refused

    def response(self, prompt: str, tokens: int, seconds: float) -> Any:
        """Return the response to a prompt.

        Raises:
            JudgeError: the server answers with another status than that of success.
            OSError: it cannot be reached.
            ValueError: the response is not JSON, or the key cannot be sent.
        """
        refused = set(self._refused)
        while True:
            try:
                response = _sent(self._url, self._body(prompt, tokens, refused), seconds)
            except JudgeError as failure:
                named = _named(failure.text) - refused
                if failure.status != REFUSED or not named:
                    raise
                refused |= named
            else:
                self._refused = refused
                return response

    def _body(self, prompt: str, tokens: int, refused: set[str]) -> dict[str, Any]:
        limit = NEWER_LIMIT if LIMIT in refused else LIMIT
        body = {"model": self._model, "messages": [{"role": "user", "content": prompt}], limit: tokens}
        return body if TEMPERATURE in refused else body | {TEMPERATURE: 0}


def _named(text: str) -> set[str]:
    """Return the parameters that an error is about: in the field that OpenAI has for it, or else in its words."""
    try:
        parameter = json.loads(text)["error"]["param"]
    except (ValueError, KeyError, TypeError):
        parameter = None
    if parameter:
        return {name for name in REFUSABLE if name == parameter}
    return {name for name in REFUSABLE if re.search(rf"\b{name}\b", text)}


def _sent(url: str, body: dict[str, Any], seconds: float) -> Any:
    """Return the response to a request; servers that are busy are asked again."""
    headers = {"Content-Type": "application/json"}
    if key := _key():
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(_NotFollowed)
    for attempt in range(TRIES):
        try:
            with opener.open(request, timeout=seconds) as response:
                return json.loads(response.read(MOST_BYTES))
        except urllib.error.HTTPError as error:
            if error.code not in BUSY or attempt == TRIES - 1:
                text = error.read(MOST_OF_REASON).decode("utf-8", "replace")
                raise JudgeError(error.code, text.strip() or str(error.reason)) from error
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError


def _key() -> str:
    """Return the key without the line break that files of secrets end with; empty if there is none.

    Raises:
        ValueError: it cannot be sent. http.client would say so with the key itself.
    """
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ValueError(f"the key in {name} has characters that a header cannot hold")
            return key
    return ""
