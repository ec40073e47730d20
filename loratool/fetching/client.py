"""The Hub's client as everything here uses it: patient where a fault passes, plain where one stays.

The client itself tries again only some of its requests; its `http_backoff` is for an address, and these are calls.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, TypeVar

from loratool import __version__
from loratool.errors import HubError, LoratoolError, escaped, printable, without_tokens
from loratool.fetching.answers import LARGEST_ANSWER, LONGEST_WAIT, asked_wait, limited
from loratool.lazy import hub, hub_constants, hub_errors, hub_utils

if TYPE_CHECKING:
    import logging


Result = TypeVar("Result")
WAITS = (1.0, 2.0, 4.0, 8.0, 8.0)  # seconds between tries, as the client itself waits
FROM_ELSEWHERE = "binary IO buffer"  # what is sent while it is read
FEW_WAITS = 2  # of them, where nothing listens at the other end
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that another try may not meet


def api() -> hub.HfApi:
    """The client; its bars are shown where somebody can see them, and what it logs is safe to show.

    Raises `HubError` where HF_ENDPOINT is not an address.
    """
    import logging

    if not str(hub_constants.ENDPOINT).startswith(("https://", "http://")):
        found = printable(repr(endpoint()))
        raise HubError(f"HF_ENDPOINT must be an address such as https://huggingface.co (got {found})")
    if not (sys.stderr and sys.stderr.isatty()):
        hub_utils.disable_progress_bars()
    for handler in logging.getLogger("huggingface_hub").handlers:
        if shown not in handler.filters:
            handler.addFilter(shown)
    return hub.HfApi(library_name="loratool", library_version=__version__)


def shown(record: logging.LogRecord) -> bool:
    """Let a message of the client pass that repeats what a server said, in characters that no terminal obeys.

    One says that what comes from a store is sent in another way, which nobody can change.
    """
    record.msg, record.args = escaped(without_tokens(record.getMessage()), keep="\n"), ()
    return FROM_ELSEWHERE not in record.msg


def endpoint() -> str:
    """The address of the Hub that is asked, to be shown: the public one, or what HF_ENDPOINT names."""
    return without_tokens(str(hub_constants.ENDPOINT))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask."""
    return bool(hub_constants.HF_HUB_OFFLINE)


def patiently(call: Callable[[], Result]) -> Result:
    """What `call` returns, tried again where it fails for a reason that passes. It must be harmless to repeat."""
    for number in range(len(WAITS) + 1):
        try:
            return call()
        except Exception as error:
            wait_after(error, number)
    raise AssertionError("the last try returns or raises")


def wait_after(error: Exception, number: int) -> None:
    """Wait before the next try after try `number`, from 0; raise the error where there is no use in another."""
    refused = any(kind.__name__ == "ConnectError" for each in causes(error) for kind in type(each).__mro__)
    if number >= (FEW_WAITS if refused else len(WAITS)) or not passes(error):
        raise error
    response: Any = getattr(error, "response", None)
    time.sleep(min(asked_wait(getattr(response, "headers", {})), LONGEST_WAIT) or WAITS[number])


def passes(error: BaseException) -> bool:
    """Whether a fault of the server or of the line is one that another try may not meet."""
    for each in causes(error):
        if isinstance(each, hub_errors.OfflineModeIsEnabled):
            return False
        if isinstance(each, hub_errors.HfHubHTTPError):
            return each.response is not None and each.response.status_code in PASSING
        if is_of_the_line(each):
            return True
    return False


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def is_of_the_line(error: BaseException) -> bool:
    """Whether no answer came: refused, dropped, timed out. The client is built on httpx or on httpx2."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


@contextmanager
def asking(repo: str, revision: str | None = None, most: int = LARGEST_ANSWER) -> Iterator[None]:
    """Turn what the client raises inside into a `HubError` that tells the next step.

    What a server answers is checked on its way to the client, and has at most `most` bytes.
    """
    try:
        with limited(most):
            yield
    except LoratoolError:
        raise
    except Exception as error:
        for each in causes(error):
            if isinstance(each, hub_errors.HFValidationError):
                raise HubError(f"{printable(repo)}: not a valid repository name: {told(each)}") from None
            if isinstance(each, hub_errors.HfHubHTTPError):
                raise HubError(f"{printable(repo)}: {refusal(each, repo, revision)}", hint=login_for(each)) from None
            if is_of_the_line(each) or isinstance(each, ConnectionError):
                raise HubError(f"{printable(repo)}: {unreachable(each)}") from None
            if isinstance(each, hub_errors.LocalEntryNotFoundError) and each.__cause__ is None:
                raise HubError(
                    f"{printable(repo)}: {endpoint()} did not answer, and the cache lacks some of the files; try "
                    "again once you are online"
                ) from None
        if is_of_the_answer(error):
            kind = type(error).__name__
            raise HubError(
                f"{printable(repo)}: the Hub's client cannot read the answer of {endpoint()} ({kind}: {told(error)}); "
                "check HF_ENDPOINT and any proxy"
            ) from None
        raise


def is_of_the_answer(error: Exception) -> bool:
    """Whether it was raised inside the client, and not by this disk: an answer that it cannot make anything of."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        return False
    return any(
        frame.f_globals.get("__name__", "").startswith("huggingface_hub") for frame, _ in walk_tb(error.__traceback__)
    )


def unreachable(error: BaseException) -> str:
    """Why no answer came, and what to do about it. Large files go through Xet, which mirrors of the Hub may lack."""
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to use the Hub"
    if any(
        "xet" in frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)
    ):  # the client's `_upload_xet_files`
        return (
            f"{endpoint()} does not accept uploads through Xet ({type(error).__name__}: {told(error)}); check the "
            "network and try again, or set HF_HUB_DISABLE_XET=1 to send them without it"
        )
    return (
        f"{endpoint()} cannot be reached ({type(error).__name__}: {told(error)}); check the network and try "
        "again, or set HF_HUB_OFFLINE=1 to use only the cache"
    )


def login_for(error: Any) -> str:
    """The command after which the Hub may not refuse any more; empty where it is not about who asks."""
    status = error.response.status_code if error.response is not None else 0
    by_name = isinstance(error, hub_errors.RepositoryNotFoundError) and not isinstance(error, hub_errors.GatedRepoError)
    return "hf auth login" if status in (401, 403) and not by_name else ""


def refusal(error: Any, repo: str, revision: str | None) -> str:
    """Why the Hub refused, and what to do about it."""
    page = f"{endpoint()}/{printable(repo)}"
    status = error.response.status_code if error.response is not None else 0
    said = without_tokens(printable(error.server_message or ""))
    match error:
        case hub_errors.GatedRepoError():
            return f"is gated; request access at {page}, then log in with `hf auth login`"
        case hub_errors.DisabledRepoError():
            return f"is disabled by the Hub; {page} says why"
        case hub_errors.RepositoryNotFoundError():
            return (
                "no such local folder or file, and no such repository on the Hub that you may read; check the "
                "spelling, or log in with `hf auth login` if it is private"
            )
        case hub_errors.RevisionNotFoundError():
            return f"has no revision {printable(revision or '')}; see the branches and tags at {page}/tree/main"
        case hub_errors.EntryNotFoundError():
            return f"one of its files was not found; see the files at {page}/tree/main"
    match status:
        case 401:
            return "the token is not valid; run `hf auth login`, or correct HF_TOKEN"
        case 403 if error.response.request.method in ("GET", "HEAD"):
            return f"you may not read it ({said or 'forbidden'}); log in with `hf auth login` as a user with access"
        case 403:
            return f"the token may not do this ({said or 'forbidden'}); log in with one that has write access"
        case 413:
            return f"a file is larger than the Hub accepts ({said}); pass --shard-size to write smaller files"
        case 429:
            return "too many requests to the Hub; wait a few minutes, then run the same command to continue"
    if status >= 500:
        return f"the Hub has a server error (status {status}); run the same command later to continue"
    return f"the Hub answered with status {status}: {said or told(error)}"


def told(error: BaseException) -> str:
    """The words of a foreign error, safe to show."""
    return without_tokens(printable(str(error).strip().split("\n")[0]))
