"""Text that others wrote, made fit to be shown.

A class name, a file name or a model's id may hold more than letters: an escape character steers a terminal (it can rewrite what
stands above, or set the clipboard), a bidirectional mark lets "gpj.exe" read "exe.jpg". Such characters are shown by their
codes, as Python writes them.
"""

import unicodedata

HARMFUL = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, lone surrogates, line and paragraph separators
HARMLESS = "\n\u200c\u200d"  # (non-)joiners: parts of words in Persian and Hindi, and of emoji


def printable(text: str) -> str:
    """The text with every character that would be obeyed instead of shown replaced by its code; lines stay lines."""
    if text.isascii() and text.isprintable():  # nearly always
        return text
    return "".join(_code(c) if unicodedata.category(c) in HARMFUL and c not in HARMLESS else c for c in text)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()
