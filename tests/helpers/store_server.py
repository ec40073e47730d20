"""An object store on loopback: moto's own server in this process, with what it was asked, and faults on the way to it.

    with StoreServer() as store:
        store.put("models", folder, "team/base")
        store.fault = Storm({503: 0.3})

Everything that a client and a store exchange goes through real sockets. The store's content outlives its server, so
that it can be stopped and started.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("moto", reason="moto, which acts as the store, is not installed")

from moto.server import create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

logging.getLogger("werkzeug").setLevel(logging.ERROR)
BUCKET, SHARDS = "models", 2  # of the base that most tests read
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-bPxRfiCYEXAMPLEKEY"}
# What a fault does to an answer: "short" ends the body early, "reset" drops the connection, "tag" gives another ETag,
# "slow" waits first, "lost" does what was asked and drops the answer; a number is a status; a text a refusal's code.
Fault = int | str | None
DENIED = {"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed", "SignatureDoesNotMatch"}


@dataclass
class Asked:
    """A request, and how many bytes its bodies had."""

    method: str
    bucket: str
    key: str
    query: str
    span: str  # the Range of a GET, or of what a part is copied from
    source: str  # what a part is copied from
    came: int = 0
    sent: int = 0
    status: int = 0

    @property
    def kind(self) -> str:
        """What it is for, in the words of S3's API."""
        match self.method, self.query.partition("=")[0].split("&")[0]:
            case "GET", _ if not self.key:
                return "list"
            case "GET", _ if "uploadId" in self.query:
                return "list parts"
            case "PUT", _ if "uploadId" in self.query:
                return "copy part" if self.source else "part"
            case "POST", _ if "uploads" in self.query:
                return "create"
            case "POST", _ if "uploadId" in self.query:
                return "complete"
            case "DELETE", _ if "uploadId" in self.query:
                return "abort"
        return self.method.lower()


class Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Nothing."""


class StoreServer:
    def __init__(self) -> None:
        self.requests: list[Asked] = []
        self.fault: Callable[[Asked], Fault] = lambda _asked: None
        self.app = create_backend_app("s3")
        self.port, self.lock, self.completing = 0, threading.Lock(), threading.Lock()

    def __enter__(self) -> StoreServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to listen, at the same address as before."""
        self.server = make_server("127.0.0.1", self.port, self.answer, threaded=True, request_handler=Quiet)
        self.port = self.server.server_port
        self.server.daemon_threads = True  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "*"}

    def answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = unquote(urlsplit(environ.get("RAW_URI") or environ["PATH_INFO"]).path).lstrip("/")
        bucket, _, key = path.partition("/")
        span = environ.get("HTTP_RANGE") or environ.get("HTTP_X_AMZ_COPY_SOURCE_RANGE") or ""
        source = environ.get("HTTP_X_AMZ_COPY_SOURCE", "")
        asked = Asked(environ["REQUEST_METHOD"], bucket, key, environ["QUERY_STRING"], span, source)
        asked.came = int(environ.get("CONTENT_LENGTH") or 0)
        fault = self.fault(asked)
        connection: socket.socket = environ["werkzeug.socket"]
        if fault == "slow":
            time.sleep(0.3)
            fault = None
        if fault == "reset":
            raise drop(connection)
        if fault is not None and fault not in ("short", "tag", "lost"):
            return self.refuse(asked, environ, start, fault)
        told: list[Any] = []

        def begin(status: str, headers: list[tuple[str, str]], *more: object) -> None:
            asked.status = int(status.split()[0])
            told[:] = [status, headers]

        # a store completes one upload after the other; moto fails where two are completed at the same moment
        with self.completing if asked.kind in ("complete", "abort") else nullcontext():
            body = b"".join(self.app(environ, begin))
        status, headers = told
        asked.sent = len(body)
        with self.lock:
            self.requests.append(asked)
        if fault == "lost":
            raise drop(connection)
        if fault == "tag":
            headers = [(n, '"00000000000000000000000000000000"' if n.lower() == "etag" else v) for n, v in headers]
        start(status, headers)
        if fault == "short" and len(body) > 1:
            return cut_off(body, connection)
        return [body]

    def refuse(
        self, asked: Asked, environ: dict[str, Any], start: Callable[..., Any], fault: int | str
    ) -> Iterable[bytes]:
        environ["wsgi.input"].read(asked.came)
        status = fault if isinstance(fault, int) else 403 if fault in DENIED else 400
        code = fault if isinstance(fault, str) else "SlowDown" if fault == 503 else "InternalError"
        asked.status = status
        with self.lock:
            self.requests.append(asked)
        body = f"<Error><Code>{code}</Code><Message>{code} {KEYS['AWS_SECRET_ACCESS_KEY']}</Message></Error>".encode()
        start(f"{status} Refused", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    @cached_property  # to make one takes longer than most requests
    def client(self) -> Any:
        """A client of its own, whose requests are counted as all others are."""
        import boto3

        keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        return boto3.session.Session(**keys).client("s3", region_name="us-east-1", endpoint_url=self.url)

    def put(self, bucket: str, folder: Path, prefix: str) -> None:
        """Put a folder into a bucket, which is made where it is not there."""
        client = self.client
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.put_object(
                    Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder).as_posix()}", Body=path.read_bytes()
                )
        self.requests.clear()

    def objects(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """Everything below a prefix, by name."""
        return {name[len(prefix) + 1 :]: body for name, body in self.everything(bucket, f"{prefix}/").items()}

    def everything(self, bucket: str, begin: str = "") -> dict[str, bytes]:
        """Every object of a bucket whose key begins so, by its key."""
        client = self.client
        found: dict[str, bytes] = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=begin):
            for entry in page.get("Contents", ()):
                found[entry["Key"]] = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        return found

    def uploads(self, bucket: str) -> list[str]:
        """The keys of multipart uploads that are neither completed nor aborted."""
        return [each["Key"] for each in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]

    def forget_uploads(self, bucket: str) -> None:
        """Abort those that tests have left: all stores of a process keep their uploads in one place."""
        client = self.client
        for each in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
            client.abort_multipart_upload(Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"])


def stormy(seed: int, lost: bool = False, share: float = 0.35, most: int = 3) -> Callable[[Asked], Fault]:
    """Faults of every kind for a `share` of the requests, drawn by a seed; none fails more than `most` times.

    With `lost`, some of them are done although no answer comes.
    """
    drawn, times, lock = random.Random(seed), Counter[tuple[str, str, str, str]](), threading.Lock()
    kinds: list[Fault] = [503, 500, "short", "reset", "tag", "slow", *(["lost"] if lost else [])]

    def fault(asked: Asked) -> Fault:
        name = asked.method, asked.key, asked.query, asked.span
        with lock:
            if drawn.random() < share and times[name] < most:
                times[name] += 1
                return drawn.choice(kinds)
        return None

    return fault


def cut_off(body: bytes, connection: socket.socket) -> Iterator[bytes]:
    """Half of a body, and the end of the connection."""
    yield body[: len(body) // 2]
    raise drop(connection)


def drop(connection: socket.socket) -> ConnectionResetError:
    """End a connection by a reset; the error that has the server forget it."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    return ConnectionResetError()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def settled(record: bytes) -> Any:
    """A record without what tells where its run took place."""
    table = json.loads(record)
    return {key: value for key, value in table.items() if key not in ("command", "operands")}
