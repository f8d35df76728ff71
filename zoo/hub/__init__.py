"""A model's folder ⇄ a Hub repository."""

from zoo.hub.pulling import pull
from zoo.hub.pushing import push

__all__ = ["pull", "push"]
