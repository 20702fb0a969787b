"""The errors Fuseline raises on purpose: each says what went wrong, where, and what to do about it."""


class FuselineError(Exception):
    """Base of every error that Fuseline raises on purpose."""


class UnsupportedModelError(FuselineError, ValueError):
    """The model holds something that cannot be compiled without the risk of a wrong answer."""


class VerificationError(FuselineError, ValueError):
    """A graph is malformed, or a compiled graph does not compute what its source computes."""


class ExpectationError(FuselineError, ValueError):
    """A fusion that the caller demanded did not happen the demanded number of times."""


class InvalidRequestError(FuselineError, ValueError):
    """A request that can never be served: an empty prompt, an unknown token, a bad sampling parameter."""
