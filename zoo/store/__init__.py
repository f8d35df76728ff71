"""Folder ⇄ model. A folder is a Hub repository."""

from zoo.store.folders import load, load_fetched, network, read_config, save, write_card

__all__ = ["load", "load_fetched", "network", "read_config", "save", "write_card"]
