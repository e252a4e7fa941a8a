"""Text of users, such as names of classes and files, made safe to show in terminals, pictures and HTML."""

import html


def printable(text: str) -> str:
    """Return text with escapes in place of characters that do not print, control a terminal or change the layout."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def escape(text: object) -> str:
    """Return text for HTML, also inside of attributes."""
    return html.escape(printable(str(text)))
