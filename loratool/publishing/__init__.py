"""What goes to the Hub: a finished folder by `push`, a model that never is whole on this disk by `stream`."""

from __future__ import annotations

from loratool.publishing.pushing import push
from loratool.publishing.streaming import stream
from loratool.results.push import PushReport
from loratool.results.stream import StreamReport

__all__ = ["PushReport", "StreamReport", "push", "stream"]
