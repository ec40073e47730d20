"""Writing objects: whole ones, ones that nobody may have written before, and uploads in numbered parts."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loratool.errors import StoreError
from loratool.stores.client import ConditionError, GoneError, PassingError, ask, connection, patiently
from loratool.stores.names import StorePath
from loratool.stores.objects import StoredObject

MD5 = re.compile(r'"?([0-9a-f]{32})"?')


@dataclass(frozen=True)
class Sent:
    """A part of an upload, as the store has it."""

    tag: str  # its ETag
    size: int


def put(place: StorePath, content: bytes) -> str:
    """Write an object, whatever is there; its ETag."""
    return str(ask("put_object", place, Key=place.key, Body=content)["ETag"])


def put_new(place: StorePath, content: bytes) -> bool:
    """Write an object where there is none; False where there is one, unless it has this content.

    An answer that was lost is told from another writer by what the object holds.
    """
    try:
        ask("put_object", place, Key=place.key, Body=content, IfNoneMatch="*")
    except ConditionError:
        return get(place) == content
    return True


def get(place: StorePath) -> bytes | None:
    """All of an object that is small; None where there is none."""

    def read() -> bytes:
        answer = connection().client.get_object(Bucket=place.bucket, Key=place.key)
        found: bytes = answer["Body"].read()
        if len(found) != answer["ContentLength"]:
            raise PassingError(f"{len(found)} of {answer['ContentLength']} bytes")
        tag = MD5.fullmatch(str(answer.get("ETag")))
        if tag and is_md5(answer) and tag[1] != md5(found):
            raise PassingError("other bytes than the object has")
        return found

    try:
        return patiently(place, read)
    except GoneError:
        return None


def remove(place: StorePath) -> None:
    """Delete an object, where there is one."""
    ask("delete_object", place, Key=place.key)


def head(place: StorePath) -> tuple[str, int] | None:
    """ETag and size of an object; None where there is none."""
    with suppress(GoneError):
        answer = ask("head_object", place, Key=place.key)
        return str(answer["ETag"]), int(answer["ContentLength"])
    return None


def begin(place: StorePath) -> str:
    """A new upload of an object, by its id."""
    return str(ask("create_multipart_upload", place, Key=place.key)["UploadId"])


def send(place: StorePath, upload: str, number: int, content: mmap.mmap) -> str:
    """Bring one part of an upload to the store; its ETag.

    The client reads memory that is a file, too, in small steps; of a `bytearray` it may make a copy.
    An ETag that is not the MD5 of what was sent is believed only if the store lists the part under it, as those do that
    encrypt.
    """
    client, wanted = connection().client, md5(content)

    def put_part() -> str:
        content.seek(0)
        answer = client.upload_part(
            Bucket=place.bucket, Key=place.key, UploadId=upload, PartNumber=number, Body=content
        )
        tag = str(answer.get("ETag", ""))
        match = MD5.fullmatch(tag)
        if not (match and match[1] == wanted) and sent_parts(place, upload, number).get(number) != Sent(
            tag, len(content)
        ):
            raise PassingError(f"ETag {tag} for a part of other bytes")
        return tag

    return patiently(place, put_part)


def copy(place: StorePath, upload: str, number: int, source: StoredObject, start: int, stop: int) -> tuple[str, str]:
    """Have the store make one part of an upload of a range of an object in the state in which it was listed.

    Gives its ETag, and its MD5 in hexadecimal, empty where the store does not tell that.
    """
    answer = ask(
        "upload_part_copy",
        place,
        Key=place.key,
        UploadId=upload,
        PartNumber=number,
        CopySource={"Bucket": source.place.bucket, "Key": source.place.key},
        CopySourceRange=f"bytes={start}-{stop - 1}",
        CopySourceIfMatch=source.tag,
    )
    tag = str(answer["CopyPartResult"]["ETag"])
    match = MD5.fullmatch(tag)
    return tag, match[1] if match and is_md5(answer) else ""


def sent_parts(place: StorePath, upload: str, only: int = 0) -> dict[int, Sent]:
    """What a store has of an upload, by number; `only` the part of one number. Raises `GoneError` where it has ended."""
    found: dict[int, Sent] = {}
    words: dict[str, Any] = {"PartNumberMarker": only - 1, "MaxParts": 1} if only else {}
    while True:
        answer = ask("list_parts", place, Key=place.key, UploadId=upload, **words)
        for each in answer.get("Parts", ()):
            found[int(each["PartNumber"])] = Sent(str(each["ETag"]), int(each["Size"]))
        if only or not answer.get("IsTruncated"):
            return found
        words["PartNumberMarker"] = answer["NextPartNumberMarker"]


def complete(place: StorePath, upload: str, tags: Sequence[str], size: int) -> None:
    """Make the object of an upload of all of these parts; once more does no harm.

    Raises `StoreError` where the upload is gone, and the object is not what it would have made.
    """
    parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
    try:
        ask("complete_multipart_upload", place, Key=place.key, UploadId=upload, MultipartUpload={"Parts": parts})
    except GoneError:
        if not is_completed(place, tags, size):
            raise StoreError(f"{place}: its upload was removed by something else; start again with --abort") from None


def is_completed(place: StorePath, tags: Sequence[str], size: int) -> bool:
    """Whether an object is the one that an upload of these parts makes."""
    found = head(place)
    if found is None or found[1] != size or not found[0].strip('"').endswith(f"-{len(tags)}"):
        return False
    known = [MD5.fullmatch(tag) for tag in tags]
    if all(known):
        joined = hashlib.md5(b"".join(bytes.fromhex(match[1]) for match in known if match), usedforsecurity=False)
        return found[0].strip('"') == f"{joined.hexdigest()}-{len(tags)}"
    return True


def abort(place: StorePath, upload: str) -> None:
    """End an upload, and let go of what it has; one that has ended is as it should be."""
    with suppress(GoneError):
        ask("abort_multipart_upload", place, Key=place.key, UploadId=upload)


def uploads_of(place: StorePath, keys: Mapping[str, object]) -> Iterator[tuple[StorePath, str]]:
    """The uploads under way of some objects below a place, by their keys: object and id."""
    words: dict[str, Any] = {"Prefix": place.prefix}
    while True:
        answer = ask("list_multipart_uploads", place, **words)
        for each in answer.get("Uploads", ()):
            if each["Key"] in keys:
                yield StorePath(place.bucket, str(each["Key"])), str(each["UploadId"])
        if not answer.get("IsTruncated"):
            return
        words |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer.get("NextUploadIdMarker", "")}


def md5(content: bytes | mmap.mmap) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def is_md5(answer: Mapping[str, Any]) -> bool:
    """Whether the ETag in an answer can be an MD5: not where the store encrypts with keys of somebody."""
    return "SSECustomerAlgorithm" not in answer and not str(answer.get("ServerSideEncryption", "")).startswith(
        "aws:kms"
    )
