"""Semi-supervised classification of paired medical images (MICS, arXiv 2509.17492).

``mics_fast.load(folder)`` loads a trained classifier; ``mics-fast --help`` lists the commands.
"""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"]:
    # `python -m mics_fast.X`, before X is imported: Python has put the current folder first on the
    # module path, so a file in a data folder from elsewhere could replace any module imported from
    # here on. The folder of this package itself stays on the path.
    import os.path

    _here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.path[:1] == [os.getcwd()] != [_here]:
        del sys.path[0]

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mics_fast.inference.predictor import Predictor

__all__ = ["load"]


def load(*folders: str | os.PathLike[str]) -> Predictor:
    """Load a trained classifier.

    Args:
        folders: Run folder of ``mics_fast.train``, or folder of ``mics_fast.export``; of several,
            the opinions are averaged.

    Returns:
        A predictor with ``classes``, ``modalities`` and ``predict(source)``; the source is a
        manifest, a folder of images, files or arrays.

    Raises:
        mics_fast.common.errors.InputError: the folder holds no classifier, or a damaged one.

    Examples:
        >>> import mics_fast
        >>> model = mics_fast.load("runs/demo")  # doctest: +SKIP
        >>> (answer,) = model.predict({"wli": "a.png", "nbi": "b.png"})  # doctest: +SKIP
        >>> answer["class"], answer["uncertainty"]  # doctest: +SKIP
        ('plaque-green', 0.12)
    """
    # Imported here, so that importing the package stays fast.
    from pathlib import Path

    from mics_fast.inference.predictor import Predictor

    return Predictor.load(*map(Path, folders))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mics-fast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
