"""The client of a store as everything here uses it: patient where a fault passes, plain where one stays.

boto3 takes credentials, endpoint and region from the environment and from its own files. It tries nothing again here:
what it would try again is the request, and a body that ends early or is of another object is found only behind it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from loratool import __version__
from loratool.errors import LoratoolError, StoreError, UsageError, printable, without_tokens
from loratool.lazy import installed
from loratool.stores.names import StorePath

Result = TypeVar("Result")
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0)  # seconds between tries, more or less
FEW_WAITS = 4  # of them, where nothing listens at the other end
THREADS = "loratool-store"  # the names of those of a connection begin with it
MOST_REQUESTS = 32  # that are under way at the same time
CONNECT, READ = 10, 60  # seconds without an answer, and without a byte of it
INSTALL = 'pip install "loratool[s3]"'
# What stores say that another try may not meet.
PASSING = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"}
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
UNKNOWN_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"}
WITHOUT_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
GONE = {"NoSuchKey", "NoSuchUpload", "404"}
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
HUB_GATEWAY = "s3.hf.co"  # before the storage buckets of Hugging Face
WITHOUT_TRAILERS = (HUB_GATEWAY,)  # hosts that do not read the checksums which boto3 appends to what it sends
CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")  # settings of boto3
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class PassingError(Exception):
    """An answer that is not what was asked for; another try may bring it."""


class ConditionError(StoreError):
    """The object is not, or is, as the request had it."""


class GoneError(StoreError):
    """There is no such object, or no such upload."""


@dataclass(frozen=True)
class Connection:
    """The client, and the threads that ask for several things at a time."""

    client: Any
    pool: ThreadPoolExecutor
    endpoint: str  # to be shown


def connection() -> Connection:
    """That of this process and its environment. Raises `UsageError` where boto3 is not installed."""
    if not installed("boto3"):
        raise UsageError("s3:// addresses need boto3, which is not installed", hint=INSTALL)
    settings = frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    return connected(os.getpid(), settings)


@cache
def connected(_process: int, settings: frozenset[tuple[str, str]]) -> Connection:
    """A new connection; a process has one for each state of its environment."""
    import boto3
    from botocore.config import Config

    named = dict(settings)
    own = next((named[name] for name in ENDPOINTS if named.get(name)), "")
    plain = dict.fromkeys(CHECKSUMS, "when_required") if host_of(own) in WITHOUT_TRAILERS else {}
    config = Config(
        retries={"total_max_attempts": 1},
        max_pool_connections=MOST_REQUESTS,
        connect_timeout=CONNECT,
        read_timeout=READ,
        user_agent_extra=f"loratool/{__version__}",
        s3={"addressing_style": "path"} if own else None,  # a bucket of MinIO has no host name of its own
        **plain,
    )
    try:
        session = boto3.session.Session()
        region = session.region_name or named.get("AWS_REGION") or ("us-east-1" if own else None)
        client = session.client("s3", region_name=region, config=config)
    except Exception as error:
        raise StoreError(why_not_set_up(error, named)) from None
    pool = ThreadPoolExecutor(MOST_REQUESTS, thread_name_prefix=THREADS)
    return Connection(client, pool, without_tokens(str(client.meta.endpoint_url)))


def why_not_set_up(error: Exception, named: Mapping[str, str]) -> str:
    """What is wrong with the environment, or with the files that boto3 reads."""
    kinds, endpoint = kinds_of(error), next((name for name in ENDPOINTS if named.get(name)), "")
    if "ProfileNotFound" in kinds:
        return (
            f"the profile {printable(repr(named.get('AWS_PROFILE', 'default')))} is not configured; check AWS_PROFILE"
        )
    if kinds & WITHOUT_CREDENTIALS:
        return no_credentials(error)
    if endpoint and "ValueError" in kinds:
        return f"{endpoint} must be an address such as http://localhost:9000"  # what it is may hold a password
    return f"boto3 cannot be set up ({type(error).__name__}); check AWS_* and its config files"


def no_credentials(error: Exception) -> str:
    return (
        f"no usable credentials ({type(error).__name__}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_PROFILE, or log in with your provider's tool"
    )


def host_of(endpoint: str) -> str:
    """The host of an address; empty for what is none, which boto3 refuses."""
    with suppress(ValueError):
        return urlsplit(endpoint).hostname or ""
    return ""


def ask(operation: str, place: StorePath, **words: Any) -> Any:
    """The answer to a request about a bucket; one that fails for a reason that passes is made again.

    Raises:
        StoreError: refused, or out of reach for longer than it takes to be patient.
        ConditionError: the condition of the request does not hold.
    """
    call = getattr(connection().client, operation)
    return patiently(place, lambda: call(Bucket=place.bucket, **words))


def patiently(place: StorePath, call: Callable[[], Result]) -> Result:
    """What `call` returns, tried again where it fails for a reason that passes. It must be harmless to repeat."""
    for number in range(len(WAITS) + 1):
        try:
            return call()
        except LoratoolError:
            raise
        except Exception as error:
            tries = FEW_WAITS if "EndpointConnectionError" in kinds_of(error) else len(WAITS)
            if number >= tries or not passes(error):
                raise told(place, error) from None
            time.sleep(WAITS[number] * random.uniform(0.75, 1.25))  # noqa: S311 (so that workers do not come at once)
    raise AssertionError("the last try returns or raises")


def kinds_of(error: BaseException) -> set[str]:
    """The names of an error's classes: boto3 is imported for none of them."""
    return {kind.__name__ for kind in type(error).__mro__}


def passes(error: BaseException) -> bool:
    """Whether a fault of the store or of the line is one that another try may not meet."""
    kinds = kinds_of(error)
    if "ClientError" in kinds:
        return code_of(error) in PASSING or status_of(error) in PASSING_STATUS
    of_the_line = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "HTTPError"}
    return bool(kinds & {*of_the_line, "PassingError", "FlexibleChecksumError"}) and "ProxyConnectionError" not in kinds


def code_of(error: Any) -> str:
    """What a store calls a refusal."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def told(place: StorePath, error: Exception) -> Exception:
    """The error of ours for one of the client's; what it does not know stays as it is. No text of a store is shown:
    some of them repeat what was signed.
    """
    kinds, endpoint, place = kinds_of(error), connection().endpoint, place.output
    if "ClientError" in kinds:
        code, status = code_of(error), status_of(error)
        if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return ConditionError(f"{place}: the object was written by something else in the meantime")
        if code in GONE:
            return GoneError(f"{place}: no longer there ({code})")
        return StoreError(f"{place}: {refusal(code, status, endpoint)}")
    if kinds & WITHOUT_CREDENTIALS or any("Token" in kind for kind in kinds):
        return StoreError(f"{place}: {no_credentials(error)}")
    if passes(error):
        reason = str(error) if isinstance(error, PassingError) else type(error).__name__
        if "EndpointConnectionError" in kinds:
            return StoreError(
                f"{place}: {endpoint} is unreachable; check AWS_ENDPOINT_URL and the network, then try again"
            )
        return StoreError(f"{place}: {endpoint} gave an unexpected answer ({printable(reason)}); try again later")
    if "BotoCoreError" in kinds:
        return StoreError(f"{place}: boto3 cannot make this request ({type(error).__name__}); check AWS_*")
    return error


def refusal(code: str, status: int, endpoint: str) -> str:
    """Why a store refused, and what to do about it."""
    named = f"{printable(code)}, status {status}"
    reasons = (
        (code == "NoSuchBucket", f"no such bucket at {endpoint}; check the name and AWS_ENDPOINT_URL"),
        (
            code in EXPIRED,
            f"the credentials have expired ({named}); renew them, then run the same command to continue",
        ),
        (
            code in UNKNOWN_KEYS or status == 401,
            f"the store does not accept the credentials ({named}); check them and AWS_ENDPOINT_URL",
        ),
        (code in ELSEWHERE, f"the bucket is in another region ({named}); set AWS_REGION"),
        (
            code == "RequestTimeTooSkewed",
            f"the clock of this machine differs from that of the store ({named}); set it",
        ),
        (
            status == 403,
            f"the credentials do not allow this ({named}); use some that may read here, and for OUT also write and "
            "list",
        ),
        (
            code in PASSING or status in PASSING_STATUS,
            f"the store is overloaded or has a fault ({named}); run the same command later to continue",
        ),
    )
    return next((reason for holds, reason in reasons if holds), f"the store refused the request ({named})")
