"""Measures, statistical comparisons and pictures of trained models, for evaluate.py."""

import contextlib
import os

# With an MPLBACKEND that names no backend, matplotlib cannot be imported; nothing here needs one.
backend = os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402

if backend:
    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
