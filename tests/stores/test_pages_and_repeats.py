"""Answers of a store that come in pages, and an upload that is completed once more."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import pytest
from store_server import BUCKET

from loratool.errors import StoreError
from loratool.stores import uploads
from loratool.stores.client import ask
from loratool.stores.names import StorePath
from loratool.stores.objects import listed

if TYPE_CHECKING:
    from store_server import StoreServer

PART = 5 << 20  # bytes: stores take no smaller one but the last


def sent(place: StorePath, sizes: list[int]) -> tuple[str, list[str]]:
    """An upload of parts of these sizes: its id, and their ETags."""
    upload = uploads.begin(place)
    tags = []
    for number, size in enumerate(sizes, 1):
        with mmap.mmap(-1, size) as content:
            content.write(bytes([number]) * size)
            tags.append(uploads.send(place, upload, number, content))
    return upload, tags


def test_objects_are_listed_to_the_last_page(store: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}.json" for number in range(5)]
    home = StorePath(BUCKET, "paged")
    for name in names:
        uploads.put(home / name, name.encode())
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    store.requests.clear()
    assert {name: there.size for name, there in listed(home).items()} == dict.fromkeys(names, 6)
    assert [each.kind for each in store.requests] == ["list"] * 3


def test_the_parts_of_an_upload_are_listed_to_the_last_page(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = StorePath(BUCKET, "paged-parts")

    def by_twos(request: str, there: StorePath, **words: Any) -> Any:
        return ask(request, there, **{"MaxParts": 2, **words} if request == "list_parts" else words)

    upload, tags = sent(place, [16] * 5)
    monkeypatch.setattr(uploads, "ask", by_twos)
    store.requests.clear()
    assert uploads.sent_parts(place, upload) == {n: uploads.Sent(tag, 16) for n, tag in enumerate(tags, 1)}
    assert [each.kind for each in store.requests] == ["list parts"] * 3
    assert uploads.sent_parts(place, upload, 4) == {4: uploads.Sent(tags[3], 16)}
    uploads.abort(place, upload)


def test_completing_an_upload_again_is_right_where_the_object_is_what_it_makes(store: StoreServer) -> None:
    """A store that has forgotten the upload refuses; ETag and size tell whether its object was made by it."""
    place = StorePath(BUCKET, "completed")
    upload, tags = sent(place, [PART, 9])
    uploads.complete(place, upload, tags, PART + 9)
    store.fault = lambda asked: "NoSuchUpload" if asked.kind == "complete" else None
    uploads.complete(place, upload, tags, PART + 9)
    for other, size in ((tags, PART + 8), (tags[::-1], PART + 9), (tags[:1], PART + 9)):
        with pytest.raises(StoreError, match="its upload was removed by something else"):
            uploads.complete(place, upload, other, size)
    with pytest.raises(StoreError, match="its upload was removed by something else"):
        uploads.complete(StorePath(BUCKET, "never"), upload, tags, PART + 9)
