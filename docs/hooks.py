"""Docstrings refer to code in Sphinx's notation, which editors know; here the name alone is shown."""

import re

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Called by MkDocs for every page."""
    return _ROLE.sub(lambda role: f"<code>{role[2].rpartition('.')[2] if role[1] else role[2]}</code>", html)
