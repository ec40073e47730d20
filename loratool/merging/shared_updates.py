"""Loaded updates that several weights share."""

from __future__ import annotations

import threading

from loratool.adapters.adapter import load_update
from loratool.algebra.updates.base import Update
from loratool.bases.edits import Edit
from loratool.lazy import torch

MOST_KEPT = 4  # updates that stay in memory for the next weight


class SharedUpdates:
    """Loaded updates that edits of several spans share, such as the factors of all experts; the `most` last used ones."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self.most = most
        self.lock = threading.Lock()
        self.kept: dict[tuple[int, str, torch.dtype], tuple[Update, Update]] = {}

    def load(self, edit: Edit, device: torch.device, dtype: torch.dtype) -> Update:
        """The update of an edit; it is kept where other edits have it, too."""
        update, key = edit.update, (id(edit.update), str(device), dtype)
        if not edit.shared:
            return load_update(update, device, dtype)
        with self.lock:
            pair = self.kept.pop(key, None) or (update, load_update(update, device, dtype))
            self.kept[key] = pair
            while len(self.kept) > self.most:
                del self.kept[next(iter(self.kept))]
            return pair[1]
