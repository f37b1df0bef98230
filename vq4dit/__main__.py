"""`python -m vq4dit`."""

import contextlib
import sys
import warnings

from vq4dit.extras import of_extra
from vq4dit.interrupts import CODE, leave, leave_at_once, raise_once
from vq4dit.streams import hand_over, prepare

if not sys.warnoptions:  # packages warn programmers; who uses a command can do nothing about it
    warnings.simplefilter("ignore")

prepare()
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
    with contextlib.suppress(OSError):  # a page of help; a command says itself what it could not tell
        hand_over()
if code == CODE:
    leave()
sys.exit(code)
