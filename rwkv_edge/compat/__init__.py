"""The programming interface of the `rwkv` package, over exported artifacts.

A program written for that package runs when its imports are changed::

    from rwkv_edge.compat import RWKV, PIPELINE, PIPELINE_ARGS   # or rwkv_edge.compat.model and .utils

The checkpoint is exported on first use and kept in a cache (`rwkv_edge.compat.store`). What differs, on purpose:

- a state that was passed to `RWKV.forward` is not changed, so it can be passed again; the package changes it in place;
- ``RWKV_V7_ON`` and the other environment variables are not needed: the version is read from the file;
- the weights (``model.w``, ``model.z``) are not there, and a model runs on one device as a whole.
"""

from rwkv_edge.compat.model import RWKV
from rwkv_edge.compat.utils import PIPELINE, PIPELINE_ARGS

__all__ = ["PIPELINE", "PIPELINE_ARGS", "RWKV"]
