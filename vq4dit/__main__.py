"""`python -m vq4dit`."""

import sys

from vq4dit.interrupts import CODE, leave, leave_at_once, raise_once

leave_at_once()
from vq4dit.cli import main  # noqa: E402  slow

try:
    raise_once()
    code = main()
except KeyboardInterrupt:  # before a command began
    code = CODE
finally:
    leave_at_once()
if code == CODE:
    leave()
sys.exit(code)
