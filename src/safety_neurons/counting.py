"""Counts put into words: one row holds, three rows hold."""


def numbered(quantity: int, one: str, more: str = "") -> str:
    """The quantity and what is counted: `1 row`, `3 rows`; `more` where several take more than an `s`."""
    return f"{quantity:,} {one if quantity == 1 else more or f'{one}s'}"
