"""What went wrong with the Hub, what to do next.

The text is ours, not that of the HTTP client, which may quote signed addresses or the token.
"""

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
BAD_TOKEN = f"the token holds characters that cannot be sent. Check it: {LOG_IN}."
BROKEN = "no connection to the Hub, or it broke ({kind}), and the local cache has no copy. Check it and run again."
NO_HUB = "what answers is not a Hub. Check HF_ENDPOINT, the proxy and the network's login page, then run again."
# What went wrong and what to do next, by the class of the exception, else by the HTTP status. Classes go by name, as
# huggingface_hub 1 stands on httpx and 2 on httpx2.
EXPLANATIONS: dict[str | int, str] = {
    "GatedRepoError": f"the repository is gated. Request access at {{page}}, then {LOG_IN}.",
    "RepositoryNotFoundError": f"no such repository, or a private one. Check the name; if it is private, {LOG_IN}.",
    "RevisionNotFoundError": "no such branch, tag or commit. See which there are at {page}.",
    "RemoteEntryNotFoundError": "the repository has no such file. See what it has at {page}/tree/main.",
    "OfflineModeIsEnabled": "not in the local cache, and offline mode is on. Unset HF_HUB_OFFLINE and run again.",
    "LocalProtocolError": BAD_TOKEN,
    "UnicodeError": BAD_TOKEN,
    "TransportError": BROKEN,
    "ConnectionError": BROKEN,
    "TimeoutError": BROKEN,
    "FileMetadataError": NO_HUB,
    "JSONDecodeError": NO_HUB,
    "KeyError": NO_HUB,
    "TypeError": NO_HUB,
    401: f"the Hub does not accept the token. If it has expired, {LOG_IN}.",
    403: f"the Hub refuses access. See {{page}}, and that the token may read it: {LOG_IN}.",
    404: f"not found. Check the name at {{page}}; if the repository is private, {LOG_IN}.",
    429: "too many requests. Wait a few minutes and run again.",
}
BROKEN_OUT = "no connection to the Hub, or it broke ({kind}). Check it and run again: what was sent is not sent again."
# Where a push differs.
BAD_CARD = "Invalid metadata in README.md."  # as the client says it
EXPLANATIONS_OUT: dict[str | int, str] = {
    "LocalTokenNotFoundError": f"a push needs a token that may write: {LOG_IN}.",
    "RepositoryNotFoundError": f"no such repository, or a private one. Check the name, and {LOG_IN}.",
    "OfflineModeIsEnabled": "offline mode is on. Unset HF_HUB_OFFLINE and run again.",
    "TransportError": BROKEN_OUT,
    "ConnectionError": BROKEN_OUT,
    "TimeoutError": BROKEN_OUT,
    403: f"the token may not write there. With one that may, {LOG_IN}; or ask for the change with --create-pr.",
    409: "another change is going on there. Run again.",
    412: "the branch moved in the meantime. Look at it, then run again.",
}


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when a request or a transfer fails."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    # hf_xet raises RuntimeError; the last three come of answers that are not in the Hub's form.
    return (HTTPError, EntryNotFoundError, OSError, RuntimeError, ValueError, KeyError, TypeError)


def _names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def status_of(error: BaseException) -> int:
    """The HTTP status that the Hub answered with; 0 if there was no answer."""
    return int(getattr(getattr(_root(error), "response", None), "status_code", 0))


def _root(error: BaseException) -> BaseException:
    """The request that failed, where the client says something else of it: "not in the cache", "while uploading"."""
    wrapped = {"LocalEntryNotFoundError", "RuntimeError", "ValueError"} & set(_names(error))
    return error.__cause__ if wrapped and error.__cause__ else error


def out_of_reach(error: BaseException) -> bool:
    """Whether the Hub did not answer, or only with its own failure, so that a copy in the cache may stand in."""
    reason = next((name for name in _names(error) if name in EXPLANATIONS), "")
    return reason in ("TransportError", "OfflineModeIsEnabled") or status_of(error) >= 500


def may_pass(error: BaseException) -> bool:
    """Whether the same request may do better in a moment."""
    return "TransportError" in _names(_root(error)) or status_of(error) == 429 or status_of(error) >= 500


def explain(error: BaseException, repo_id: str, writing: bool = False) -> str:
    """What went wrong and what to do next."""
    if str(error).startswith(BAD_CARD):
        return f"the Hub refuses the metadata of README.md:{str(error).removeprefix(BAD_CARD)}"
    error, status = _root(error), status_of(error)
    known = EXPLANATIONS | EXPLANATIONS_OUT if writing else EXPLANATIONS
    for key in (*_names(error), status):
        if key in known:
            return known[key].format(page=f"https://huggingface.co/{repo_id}", kind=type(error).__name__)
    if status >= 500:
        return f"the Hub itself fails (HTTP {status}). Run again later; https://status.huggingface.co may tell more."
    if status:
        return f"the Hub refuses the request (HTTP {status})."
    if isinstance(error, OSError) and error.errno is not None:
        if writing:
            return f"a file cannot be read: {error.strerror}."
        return f"the local cache cannot be used: {error.strerror}. Free space there or set HF_HOME elsewhere."
    kind = type(error).__name__
    return f"the transfer failed or was not whole ({kind}). Run again; if it fails again, with HF_HUB_DISABLE_XET=1."
