"""The Hub's client, made to give up when nothing comes."""

from __future__ import annotations

from typing import Any

SILENCE = 60.0  # seconds; a Hub that has not answered a commit by then answers 504 itself
_limited = False


def limit_silence() -> None:
    """Let a request fail whose connection stays silent for SILENCE seconds: huggingface_hub itself waits for ever.

    Time limits that a request, or the client of a program that uses this library, has of its own stay.
    """
    global _limited
    if _limited:
        return
    from huggingface_hub.utils import _http, set_client_factory

    factory = _http._GLOBAL_CLIENT_FACTORY

    def limited() -> Any:
        client = factory()
        if client.timeout.read is None:
            client.timeout = SILENCE
        return client

    set_client_factory(limited)
    _limited = True
