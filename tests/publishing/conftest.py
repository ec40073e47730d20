"""What is pushed goes to an empty Hub on loopback, unless a test file fills one of its own."""

from __future__ import annotations

from hub_fixtures import client, hub

__all__ = ["client", "hub"]
