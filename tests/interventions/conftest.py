"""Fixtures of interventions' tests."""

from tiny_pair import tiny_pair

__all__ = ["tiny_pair"]
