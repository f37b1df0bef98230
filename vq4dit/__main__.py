"""`python -m vq4dit`."""

import sys
import warnings

from vq4dit.extras import of_extra
from vq4dit.interrupts import CODE, leave, leave_at_once, raise_once

if not sys.warnoptions:  # packages warn programmers; who uses a command can do nothing about it
    warnings.simplefilter("ignore")

leave_at_once()
with of_extra("cli", "the command line"):
    from vq4dit.cli import main  # slow

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
