"""Words of others inside Markdown: they read as they were written, and make no heading, link, table, HTML or code.

Nor do addresses become links by themselves, as they do on the Hub and on GitHub: some readers look for them after they have
undone all escapes, so each is cut in two by a comment, which nobody sees.
"""

import re

from vq4dit.printable import printable

LONGEST = 200  # characters; a licence's name, a pattern, a setting
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# What begins something in Markdown. An underscore between letters does not, and names have many.
MARKS = re.compile(r"[\\`*{}\[\]#|~!$]|(?<!\w)_|_(?!\w)|(?<=\])\(|@")
# After what an address goes on: "www" (before the full stop), a scheme, the name of a mailbox, or of somebody to be told.
ADDRESS = re.compile(r"www(?=\.)|:(?=//)|@(?=\S)", re.IGNORECASE)
CUT = "\0"  # not printable, so nobody's


def plain(value: object) -> str:
    """A value as one line of text."""
    line = ADDRESS.sub(lambda begun: begun[0] + CUT, " ".join(printable(str(value)).split())[:LONGEST])
    safe = MARKS.sub(lambda mark: f"\\{mark[0]}", line)
    return "".join(ENTITIES.get(character, character) for character in safe).replace(CUT, "<!-- -->")
