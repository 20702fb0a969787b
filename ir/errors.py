"""The errors Fuseline raises on purpose: each says what went wrong, where, and what to do about it."""

from __future__ import annotations

import math
from pathlib import Path


class FuselineError(Exception):
    """Base of every error that Fuseline raises on purpose."""


class UnsupportedModelError(FuselineError, ValueError):
    """The model holds something that cannot be compiled without the risk of a wrong answer."""


class WeightsError(FuselineError, ValueError):
    """Weights that were given by name are not those of the model: one is missing, or has another shape."""


class VerificationError(FuselineError, ValueError):
    """A graph is malformed, or a compiled graph does not compute what its source computes.

    Where a pass or a kernel is to blame: ``pass_name`` (``"codegen"`` for a kernel), ``site`` (the value or the kernel),
    ``application`` (its number within the pass, if it has one), the relative RMSE ``error`` measured, the ``tolerance``,
    and the ``files`` of a reproduction.
    """

    def __init__(
        self,
        message: str,
        *,
        pass_name: str = "",
        site: str = "",
        application: int | None = None,
        error: float = math.nan,
        tolerance: float = math.nan,
        files: tuple[Path, ...] = (),
    ) -> None:
        super().__init__(message)
        self.pass_name = pass_name
        self.site = site
        self.application = application
        self.error = error
        self.tolerance = tolerance
        self.files = files


class ExpectationError(FuselineError, ValueError):
    """A fusion that the caller demanded did not happen the demanded number of times."""


class OptionError(FuselineError, ValueError):
    """An option of ``compile`` that makes no sense, or that is not available yet."""


class InvalidRequestError(FuselineError, ValueError):
    """A request that can never be served: an empty prompt, an unknown token, a bad sampling parameter."""
