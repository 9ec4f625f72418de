"""Speed: what torch works out anew for every export, and what no test changes, is worked out once."""

from __future__ import annotations

import gc
from contextlib import suppress
from functools import cache

# torch's list of operators and their ONNX functions; where a release has none of that name, the tests are slower
with suppress(ImportError, AttributeError):
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[assignment,method-assign]

# A capture makes and drops a million small objects, and by default the collector looks through all of torch for them each time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
