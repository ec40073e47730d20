"""Files on their way into a commit: large ones first and one by one, then all of them in one commit that is checked."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

from loratool.errors import HubError, UsageError, VerificationError, printable
from loratool.fetching import answers
from loratool.fetching.answers import RemoteFile, commit_of, wrong
from loratool.fetching.client import api, asking, endpoint, patiently, wait_after
from loratool.files.digests import parts_of, sha256_of
from loratool.files.hub_cache import is_hub_id
from loratool.files.stand_ins import stand_in, stream_of
from loratool.lazy import hub, hub_errors
from loratool.notes import Note
from loratool.stores.names import is_in_store

SAMPLE = 512  # bytes of a file by which the Hub decides how it is uploaded
LARGE = 1 << 20  # bytes from which a file is uploaded by itself, before the commit


@dataclass(frozen=True)
class Upload:
    """A file for a repository: one on disk, or new content."""

    name: str
    path: Path | None = None
    content: bytes | None = None

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.content or b"") if self.path is None else self.path.stat().st_size

    def read(self) -> bytes:
        return (self.content or b"") if self.path is None else self.path.read_bytes()

    def parts(self) -> Iterable[bytes]:
        """All of it, not at once."""
        return [self.content or b""] if self.path is None else parts_of(self.path)

    @cached_property
    def operation(self) -> hub.CommitOperationAdd:
        """The same for the client, which hashes it; what a file stands for is read from where it is, and hashed here."""
        if self.path is None:
            return hub.CommitOperationAdd(self.name, self.content or b"")
        if (there := stand_in(self.path)) is None:
            return hub.CommitOperationAdd(self.name, str(self.path))
        from huggingface_hub.lfs import UploadInfo

        found = hub.CommitOperationAdd(self.name, b"")
        sample = memoryview(bytearray(min(SAMPLE, self.size)))
        there.source().read(0, len(sample), sample)
        found.upload_info = UploadInfo(size=self.size, sample=bytes(sample), sha256=bytes.fromhex(sha256_of(self.path)))
        found.path_or_fileobj = stream_of(there)
        return found

    def rewind(self) -> None:
        """Before another try: an earlier one may have left what is read from elsewhere at any place."""
        if isinstance(stream := self.operation.path_or_fileobj, io.IOBase):
            stream.seek(0)

    @cached_property
    def sha256(self) -> str:
        return str(self.operation.upload_info.sha256.hex())

    @cached_property
    def blob(self) -> str:
        """SHA-1 as git makes it."""
        state = hashlib.sha1(b"blob %d\0" % self.size)  # noqa: S324 (git's own)
        for part in self.parts():
            state.update(part)
        return state.hexdigest()

    def is_there(self, remote: RemoteFile | None) -> bool:
        """Whether a file of the repository has this content."""
        if remote is None or remote.size != self.size:
            return False
        return remote.sha256 == self.sha256 if remote.sha256 else remote.blob == self.blob


@dataclass(frozen=True)
class Commit:
    """What a commit came to."""

    oid: str
    url: str
    pull_request: str = ""


def check_name(repo: str) -> None:
    """Raise `UsageError` for what can be no name of a repository."""
    if is_in_store(repo):
        raise UsageError(
            f"{printable(repo)}: only repositories of the Hub can be pushed to; to write into a store, make the output "
            "there, with s3://bucket/prefix as -o"
        )
    if repo.count("/") > 1 or not is_hub_id(repo if "/" in repo else f"me/{repo}"):
        raise UsageError(f"{printable(repo)}: not a valid repository name; expected org/name")


def full_name(repo: str) -> str:
    """The repository as `org/name`, for an account that may write; asks who the token belongs to.

    Raises `UsageError` for what can be no name, `HubError` where there is no token or one that may only read.
    """
    check_name(repo)
    if not hub.get_token():
        raise HubError(
            "pushing needs a token with write access: run `hf auth login`, or set HF_TOKEN", hint="hf auth login"
        )
    with asking(repo):
        who: object = patiently(lambda: api().whoami())
    if inside(who, "auth", "accessToken", "role") == "read":
        raise HubError("the token is read-only; run `hf auth login` with one that has write access, or set HF_TOKEN")
    return repo if "/" in repo else named_by_the_hub(f"{inside(who, 'name')}/{repo}")


def inside(table: object, *keys: str) -> object:
    """What an answer holds under these keys, one in the other; None where it does not."""
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table


def named_by_the_hub(repo: object) -> str:
    """A repository as a server calls it; raises `HubError` for what none can be called."""
    if isinstance(repo, str) and is_hub_id(repo):
        return repo
    raise wrong(endpoint(), "the name of a repository", repo, "org/name")


def open_repo(repo: str, public: bool, revision: str | None, notes: list[Note]) -> tuple[str, bool]:
    """The full name of a repository that may be written to, and whether it is private; it is made where it is missing.

    Raises as `full_name` does, and `HubError` where there is no right to that name.
    """
    repo = full_name(repo)
    with asking(repo):
        try:
            private = bool(patiently(lambda: api().model_info(repo)).private)
            if private and public:
                notes.append(
                    Note(
                        "repo-stays-private",
                        f"{repo} already exists and stays private; to make it public, change its settings",
                    )
                )
            elif not private and not public:
                notes.append(
                    Note("repo-is-public", f"{repo} already exists and is public, so everyone can see what is pushed")
                )
        except hub_errors.RepositoryNotFoundError:
            url = patiently(lambda: api().create_repo(repo, private=not public, exist_ok=True))
            repo, private = named_by_the_hub(url.repo_id), not public
            if private:
                notes.append(
                    Note(
                        "repo-new-private", f"{repo} is new and private; pass --public to make a new repository public"
                    )
                )
    if revision is not None and not revision.startswith("refs/"):
        with asking(repo, revision):
            patiently(lambda: api().create_branch(repo, branch=revision, exist_ok=True))
    if endpoint() != "https://huggingface.co":
        notes.append(Note("endpoint", f"using the Hub at {printable(endpoint())} (HF_ENDPOINT)"))
    return repo, private


def files_of(repo: str, revision: str | None) -> dict[str, RemoteFile]:
    """Every file of a revision of a repository."""
    from huggingface_hub.hf_api import RepoFile

    def listed() -> list[RepoFile]:
        return [e for e in api().list_repo_tree(repo, revision=revision, recursive=True) if isinstance(e, RepoFile)]

    with asking(repo, revision):
        found = patiently(listed)
    return answers.files_of(repo, ((f.path, f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in found))


def commit(
    repo: str,
    revision: str | None,
    uploads: Sequence[Upload],
    message: str,
    *,
    delete: Iterable[str] = (),
    create_pr: bool = False,
    tell: Callable[[int], None] = lambda _count: None,
) -> Commit:
    """Put files into a repository in one commit, whatever happens on the way, and check that they arrived.

    Objects that an earlier try has brought there are not sent again. A commit whose answer was lost is found by what
    the repository holds, so that it is not made twice; a pull request cannot be found that way and is not tried again.

    Raises:
        HubError: refused, or out of reach for longer than it takes to be patient.
        VerificationError: what is there is not what was sent.
    """
    gone = list(delete)
    with asking(repo, revision):
        for upload in uploads:
            if upload.size >= LARGE:
                patiently(partial(send, repo, upload, revision, create_pr))
            tell(upload.size)
        operations: list[Any] = [
            *(u.operation for u in uploads),
            *(hub.CommitOperationDelete(name, is_folder=False) for name in gone),
        ]
        made = None
        for number in count():
            for upload in uploads:
                upload.rewind()
            try:
                made = api().create_commit(
                    repo,
                    operations,
                    commit_message=message,
                    revision=revision,
                    create_pr=create_pr,
                )
                break
            except Exception as error:
                if create_pr:
                    raise
                wait_after(error, number)
                there = files_of(repo, revision)
                if not differing(uploads, there) and not set(gone) & set(there):
                    break
        if made is None:
            head = commit_of(repo, patiently(lambda: api().model_info(repo, revision=revision)).sha)
            done = Commit(head, f"{endpoint()}/{repo}/commit/{head}")
        else:
            done = Commit(commit_of(repo, made.oid), str(made.commit_url), str(made.pr_url or ""))
    check(repo, done.oid, uploads)
    return done


def send(repo: str, upload: Upload, revision: str | None, create_pr: bool) -> None:
    """Bring the content of a large file to the Hub, where no commit has it yet; what is there is not sent."""
    upload.rewind()
    api().preupload_lfs_files(
        repo, [upload.operation], revision=revision, create_pr=create_pr, free_memory=False, num_threads=1
    )


def differing(uploads: Iterable[Upload], there: Mapping[str, RemoteFile]) -> list[Upload]:
    """The files that a repository has not, or has with andifferent content."""
    return [upload for upload in uploads if not upload.is_there(there.get(upload.name))]


def check(repo: str, oid: str, uploads: Sequence[Upload]) -> None:
    """Hold what a commit holds to what was sent: names, sizes, SHA-256 or git's SHA-1."""
    there = files_of(repo, oid)
    if wrong := differing(uploads, there):
        raise VerificationError(
            f"{printable(repo)}: the uploaded files differ from the local ones; push again:",
            (f"{printable(u.name)}: {'different content' if u.name in there else 'missing'}" for u in wrong),
        )
