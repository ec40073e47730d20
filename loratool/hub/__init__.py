"""What goes to the Hub: a finished folder by `push`, a model that never is whole on this disk by `stream`."""

from __future__ import annotations

from loratool.hub.pushing import PushReport, push
from loratool.hub.streaming import StreamReport, stream

__all__ = ["PushReport", "StreamReport", "push", "stream"]
