"""`python -m vq4dit`."""

import contextlib
import sys
import warnings

from vq4dit.cli.streams import hand_over, prepare
from vq4dit.extras import of_extra
from vq4dit.interrupts import CODE, ENDINGS, code_of, leave, leave_at_once, raise_at_the_end, raise_once

if not sys.warnoptions:  # packages warn programmers; who uses a command can do nothing about it
    warnings.simplefilter("ignore")

prepare()
leave_at_once()
with of_extra("cli", "the command line"):
    from vq4dit.cli.main import main  # slow

try:
    raise_once()
    raise_at_the_end()
    code = main()
except KeyboardInterrupt as error:  # before a command began
    code = code_of(error)
finally:
    leave_at_once()
    with contextlib.suppress(OSError):  # a page of help; a command says itself what it could not tell
        hand_over()
if code in (CODE, *(128 + number for number in ENDINGS)):
    leave(code)
sys.exit(code)
