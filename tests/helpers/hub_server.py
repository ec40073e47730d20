"""A Hub on the loopback interface: enough of the protocol for the real client, a log of all that was asked, and faults.

    with HubServer() as hub:
        hub.add("org/model", folder)
        Client(hub, home).run("inspect", "org/model")
        assert hub.sent("GET") < 1_000_000

Large files are LFS from `lfs_from` bytes on; the server decides that, as the protocol lets it. They are served from
another origin (`localhost` for `127.0.0.1`) without a token, as a CDN does: a token that arrives there is a leak.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER, STRANGER = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader", "hf_nobodynobodynobodynobody"
ACCOUNTS = {WRITER: ("alice", "write"), READER: ("alice", "read"), STRANGER: ("bob", "write")}
PAGE = 1000  # entries of a listing


@dataclass(frozen=True)
class Blob:
    """The content of a file in a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        body = self.content
        if self.lfs:
            body = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(body)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    """A repository: branches lead to commits, commits are tables of files."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # of the commits, in order
    pulls: dict[int, str] = field(default_factory=dict)  # number → title

    def commit(self, branch: str, files: Mapping[str, Blob], message: str) -> str:
        facts = [branch, message, len(self.commits), sorted((n, b.etag) for n, b in files.items())]
        oid = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    host: str
    range: str
    token: str
    status: int = 0
    received: int = 0  # bytes of body
    sent: int = 0  # bytes of body
    body: bytes = b""  # of what is no upload


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests that match, after the first `skip`."""

    method: str
    pattern: str
    times: int = 1
    skip: int = 0
    status: int = 0  # answered in place of the real answer
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = -1  # bytes of the real answer, or of the upload, after which the line drops
    lost: bool = False  # done, and the answer never arrives


@dataclass(frozen=True)
class Lie:
    """What is said in place of the truth, to every request that matches."""

    pattern: str  # of the request's path
    headers: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[Any], object] | None = None  # of the answer's JSON
    body: bytes | None = None
    endless: bool = False  # more than 100 MB of body, of a length that is not announced


class HubServer:
    """The server, its repositories and its log."""

    def __init__(self, lfs_from: int = 4000) -> None:
        self.lfs_from = lfs_from
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lies: list[Lie] = []
        self.lock = threading.RLock()
        self.damage: set[str] = set()  # names of files that arrive with a wrong byte
        self.slow = 0.0  # seconds that an upload of an object takes at least
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that was killed
        self.http.hub = self  # type: ignore[attr-defined]
        self.port = self.http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add(self, name: str, folder: Path, *, branch: str = "main", message: str = "upload", **kind: Any) -> str:
        """Put a folder's files into a repository; the commit."""
        files = {
            path.relative_to(folder).as_posix(): self.blob(path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.repos.setdefault(name, Repo(**kind)).commit(branch, files, message)

    def blob(self, content: bytes) -> Blob:
        lfs = len(content) >= self.lfs_from
        made = Blob(content, lfs)
        if lfs:
            self.objects[made.sha256] = content
        return made

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        repo = self.repos[name]
        return {path: blob.content for path, blob in repo.commits[repo.branches[branch]].items()}

    def asked(self, method: str, pattern: str) -> list[Request]:
        with self.lock:
            return [r for r in self.log if r.method == method and re.search(pattern, r.path)]

    def sent(self, method: str = "GET", pattern: str = "") -> int:
        """Bytes of the answers to requests."""
        return sum(request.sent for request in self.asked(method, pattern))

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == request.method and re.search(fault.pattern, request.path):
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    if fault.times:
                        fault.times -= 1
                        return fault
        return None


class Dropped(Exception):
    """The line is to be cut here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub: HubServer = self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        auth = self.headers.get("Authorization", "")
        self.request_ = Request(
            self.command,
            self.path,
            self.headers.get("Host", ""),
            self.headers.get("Range", ""),
            auth.removeprefix("Bearer "),
        )
        self.fault_ = self.hub.fault(self.request_)
        with self.hub.lock:
            self.hub.log.append(self.request_)
        try:
            body = self.read_body()
            if self.command != "PUT":
                self.request_.body = body
            if self.fault_ and self.fault_.status:
                self.answer(self.fault_.status, b"{}", self.fault_.headers)
            else:
                self.route(body)
        except (Dropped, ConnectionError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        left = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            return self.read_chunks()
        parts = []
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                raise Dropped
            parts.append(piece)
            left -= len(piece)
            self.request_.received += len(piece)
            if self.fault_ and self.command == "PUT" and 0 <= self.fault_.cut <= self.request_.received:
                raise Dropped
        return b"".join(parts)

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            self.request_.received += size
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        if self.fault_ and self.fault_.lost:
            raise Dropped
        for lie in [lie for lie in self.hub.lies if re.search(lie.pattern, self.path)]:
            if lie.endless and self.command != "HEAD":
                self.never_end()
            if lie.change:
                body = json.dumps(lie.change(json.loads(body))).encode()
            body = body if lie.body is None else lie.body
            headers = {**(headers or {}), **lie.headers}
        self.request_.status = status
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault_ and self.fault_.cut >= 0:
            self.wfile.write(body[: self.fault_.cut])
            self.request_.sent += min(self.fault_.cut, len(body))
            raise Dropped
        self.wfile.write(body)
        self.request_.sent += len(body)

    def never_end(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        raise Dropped

    def json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {k: v for k, v in (("X-Error-Code", code), ("X-Error-Message", message)) if v}
        self.json({"error": message or code}, status, headers)

    @property
    def account(self) -> tuple[str, str] | None:
        return ACCOUNTS.get(self.request_.token)

    def route(self, body: bytes) -> None:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        if self.request_.token and self.account is None:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        for method, pattern, action in ROUTES:
            if (match := re.fullmatch(pattern, path)) and self.command in method:
                words = {key: unquote(value) for key, value in match.groupdict(default="").items()}
                return action(self, words, query, body)
        return self.refuse(404, message=f"no route for {self.command} {path}")

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or None when the answer has been given."""
        repo, account = self.hub.repos.get(name), self.account
        owner = account is not None and name.startswith((f"{account[0]}/", "org/"))
        if repo is None or (repo.private and not owner):
            self.refuse(404 if account else 401, "RepoNotFound", "Repository not found")
            return None
        if write and not (owner and account and account[1] == "write"):
            self.refuse(403 if account else 401, message="you need write access")
            return None
        return repo

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]] | None:
        commit = repo.resolve(revision or "main")
        if commit is None:
            self.refuse(404, "RevisionNotFound", "Revision not found")
            return None
        return commit, repo.commits[commit]

    # what can be asked

    def whoami(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if self.account is None:
            return self.refuse(401, message="Invalid username or password.")
        name, role = self.account
        return self.json({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if self.account is None or self.account[1] != "write":
            return self.refuse(403 if self.account else 401, message="you need write access")
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.account[0]}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            return self.json({"url": url, "error": "You already created this model repo"}, 409)
        if not name.startswith((f"{self.account[0]}/", "org/")):
            return self.refuse(403, message="you have no rights in this namespace")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.hub.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return self.json({"url": url, "id": name})

    def branch(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if (repo := self.repo(words["id"], write=True)) is None:
            return None
        if words["rev"] in repo.branches:
            return self.refuse(409, message="Reference already exists")
        repo.branches[words["rev"]] = repo.branches["main"]
        return self.json({})

    def validate(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        content = json.loads(body)["content"]
        if "base_model: /" in content:
            return self.json({"errors": [{"message": "base_model is no id"}]}, 400)
        return self.json({"warnings": []})

    def info(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if (repo := self.repo(words["id"])) is None or (found := self.files(repo, words["rev"])) is None:
            return None
        commit, files = found
        siblings = [
            {
                "rfilename": name,
                "size": len(blob.content),
                "blobId": blob.git_oid,
                **({"lfs": lfs_of(blob)} if blob.lfs else {}),
            }
            for name, blob in files.items()
        ]
        facts = {"_id": "1", "id": words["id"], "modelId": words["id"], "sha": commit, "private": repo.private}
        return self.json({**facts, "gated": repo.gated, "tags": [], "downloads": 0, "siblings": siblings})

    def tree(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if (repo := self.repo(words["id"])) is None or (found := self.files(repo, words["rev"])) is None:
            return None
        entries = [tree_entry(name, blob) for name, blob in sorted(found[1].items())]
        at = int(query.get("cursor", ["0"])[0])
        headers = {}
        if at + PAGE < len(entries):
            headers["Link"] = (
                f'<{self.hub.endpoint}{urlsplit(self.path).path}?recursive=True&cursor={at + PAGE}>; rel="next"'
            )
        return self.json(entries[at : at + PAGE], headers=headers)

    def paths_info(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if (repo := self.repo(words["id"])) is None or (found := self.files(repo, words["rev"])) is None:
            return None
        wanted = parse_qs(body.decode()).get("paths", [])
        return self.json([tree_entry(name, found[1][name]) for name in wanted if name in found[1]])

    def preupload(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if (repo := self.repo(words["id"], write=True)) is None or (found := self.files(repo, words["rev"])) is None:
            return None
        answers = []
        for file in json.loads(body)["files"]:
            there = found[1].get(file["path"])
            lfs = file["size"] >= self.hub.lfs_from
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": there.etag} if there else {}))
        return self.json({"files": answers})

    def batch(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if self.repo(words["id"], write=True) is None:
            return None
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                where = f"http://localhost:{self.hub.port}/lfs/{wanted['oid']}"
                verify = f"{self.hub.endpoint}/{words['id']}.git/info/lfs/verify"
                entry["actions"] = {"upload": {"href": where}, "verify": {"href": verify}}
            objects.append(entry)
        return self.json({"transfer": "basic", "objects": objects})

    def verify(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        asked = json.loads(body)
        right = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        return self.json({}) if right else self.refuse(404, message="no such object")

    def store(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        time.sleep(self.hub.slow)
        if hashlib.sha256(body).hexdigest() != words["oid"]:
            return self.refuse(400, message="the content is not what was announced")
        self.hub.objects[words["oid"]] = body
        return self.json({})

    def commit(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if (repo := self.repo(words["id"], write=True)) is None:
            return None
        with self.hub.lock:
            if (found := self.files(repo, words["rev"])) is None:
                return None
            files, message, branch = dict(found[1]), "", words["rev"]
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
                if key == "header":
                    message = value["summary"]
                    if value.get("parentCommit") not in (None, found[0]):
                        return self.refuse(412, message="A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        return self.refuse(400, message=f"unknown object {value['oid']}")
                    files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
                elif key == "deletedFile":
                    del files[value["path"]]
            answer: dict[str, object] = {}
            if query.get("create_pr"):
                number = len(repo.pulls) + 1
                branch, repo.pulls[number] = f"refs/pr/{number}", message
                answer["pullRequestUrl"] = f"{self.hub.endpoint}/{words['id']}/discussions/{number}"
            oid = repo.commit(branch, files, message)
        url = f"{self.hub.endpoint}/{words['id']}/commit/{oid}"
        return self.json({**answer, "success": True, "commitOid": oid, "commitUrl": url})

    def resolve(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        if (repo := self.repo(words["id"])) is None or (found := self.files(repo, words["rev"])) is None:
            return None
        if repo.gated and (self.account is None or self.account[0] != "alice"):
            return self.refuse(403 if self.account else 401, "GatedRepo", "Access to this model is restricted")
        blob = found[1].get(words["path"])
        if blob is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            name = Path(words["path"]).name
            headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{blob.sha256}/{name}"
            return self.answer(302, b"", headers)
        return self.content(blob.content, headers)

    def cdn(self, words: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        content = self.hub.objects[words["oid"]]
        if words["name"] in self.hub.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self.content(content, {"ETag": f'"{words["oid"]}"', "Accept-Ranges": "bytes"})

    def content(self, content: bytes, headers: dict[str, str]) -> None:
        if self.command == "HEAD":
            return self.answer(200, b"", {**headers, "Content-Length": str(len(content))})
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_.range):
            start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else len(content), len(content))
            if start >= len(content):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self.answer(206, content[start:stop], headers)
        return self.answer(200, content, headers)


Action = Callable[[Handler, dict[str, str], dict[str, list[str]], bytes], None]
NAME, REV = r"(?P<id>[^/]+/[^/]+?)", r"(?P<rev>[^/]+)"
ROUTES: tuple[tuple[str, str, Action], ...] = (
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{NAME}(?:/revision/{REV})?", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/{REV}(?:/.*)?", Handler.tree),
    ("POST", rf"/api/models/{NAME}/paths-info/{REV}", Handler.paths_info),
    ("POST", rf"/api/models/{NAME}/branch/{REV}", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/{REV}", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{NAME}\.git/info/lfs/verify", Handler.verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.store),
    ("POST", rf"/api/models/{NAME}/commit/{REV}", Handler.commit),
    ("GET HEAD", rf"/{NAME}/resolve/{REV}/(?P<path>.+)", Handler.resolve),
    ("GET HEAD", r"/cdn/(?P<oid>[0-9a-f]{64})/(?P<name>.+)", Handler.cdn),
)


def lfs_of(blob: Blob) -> dict[str, object]:
    # the tree calls it oid, the info sha256
    return {"oid": blob.sha256, "sha256": blob.sha256, "size": len(blob.content), "pointerSize": 130}


def tree_entry(name: str, blob: Blob) -> dict[str, object]:
    entry = {"type": "file", "path": name, "oid": blob.git_oid, "size": len(blob.content)}
    return entry | ({"lfs": lfs_of(blob)} if blob.lfs else {})


def tokens_on_other_origins(hub: HubServer) -> list[str]:
    return [request.path for request in hub.log if request.host.startswith("localhost") and request.token]
