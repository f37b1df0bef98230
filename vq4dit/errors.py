"""Failures whose message is meant for the person at the screen.

    VQ4DiTError
    ├── UnsupportedModelError      the model is of a kind we cannot quantize (or is quantized already)
    ├── FormatError                a packed file is broken, truncated or newer than this library
    ├── CalibrationDivergedError   the numbers stopped being numbers
    ├── JobError                   a job folder or an output folder is not what it should be
    └── HubError                   the Hub refused, broke off or could not be reached

Each message names what must hold, what was found, and what to do next. Misuse by a programmer stays a `ValueError`.
"""

BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What other people's code raises over a description of the wrong kind: anything but what we raise, and what stops us."""


def brief(error: BaseException) -> str:
    """Another's exception on one line of a message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class VQ4DiTError(Exception):
    """Base of everything a person can mend.

    The message is for a terminal and for programs. `page` says the same on a page, where the advice differs: a page has no
    options, and its reader no folders on this machine (see `page_words`).
    """

    def __init__(self, message: str = "", *, page: str = ""):
        super().__init__(message)
        self.page = page or message


class UnsupportedModelError(VQ4DiTError):
    """The model is of a kind we cannot quantize, or is quantized already."""


class FormatError(VQ4DiTError):
    """A packed file is broken, truncated or newer than this library."""


class CalibrationDivergedError(VQ4DiTError):
    """A loss became infinite or not a number."""


class JobError(VQ4DiTError):
    """A job folder or an output folder is not what it should be."""


class LeftBehind(UserWarning):
    """Something stayed on disk that is not ours to delete, or could not be deleted; the message says where and what to do."""


class HubError(VQ4DiTError):
    """The Hub refused, broke off or could not be reached.

    `reason` is one word for programs: "login", "scope", "organization", "storage", "gated", "missing", "exists",
    "changed", "too-large", "rate", "server", "network", "truncated", "cancelled", "card", "name", "checksum" or
    "unknown".
    `seconds` is how long the Hub asks to wait, 0 if it did not say.
    """

    def __init__(self, message: str, reason: str = "unknown", seconds: float = 0, *, page: str = ""):
        super().__init__(message, page=page)
        self.reason, self.seconds = reason, seconds
