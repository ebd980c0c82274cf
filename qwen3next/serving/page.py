"""The page at "/", and the headers that keep it to itself: it loads nothing and only talks to its own server."""

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files("qwen3next.serving").joinpath("page.html").read_text(encoding="utf-8")


def _hash(tag: str) -> str:
    """The source expression that allows the page's one element of this kind, and no other."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src {_hash('style')}; script-src {_hash('script')}; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
