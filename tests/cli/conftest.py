"""Fixtures of the command line's tests."""

from tiny_pair import tiny_pair

__all__ = ["tiny_pair"]
