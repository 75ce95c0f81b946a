"""Python's cycle collector, paused while tens of thousands of objects are made, none of which is garbage.

It would go through all of them again and again: half the time of reading a manifest of 37,248 tensors.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Also a decorator. Where threads overlap, the first that ends lets the collector run again, which harms none."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
