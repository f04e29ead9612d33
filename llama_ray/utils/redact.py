"""Texts without their secrets, for whatever is shown or stored."""

from __future__ import annotations

import dataclasses
import re

_HIDDEN = "***"

_USER_INFO = re.compile(
    r"""(?P<scheme>\b[A-Za-z][\w+.-]*)://(?P<user>
        [^\s/?\#"<>]*                                       # What a URI may have in front of @ ...
        | [^\s/?\#@:"<>]*:(?!\d{1,5}(?:[^\w]|$))[^\s]*      # ... or a password that nobody has quoted.
    )@""",
    re.VERBOSE,
)
_NAMES = r"secret|token|passw|pwd|credential|signature|key|auth|odbc_connect|\bsig\b"
_OPTION = re.compile(rf"(?<=[?&;])([\w.%-]*(?:{_NAMES})[\w.%-]*=)[^\s&;'\"]+", re.IGNORECASE)
_OPTION_WITH_USER = re.compile(r"(?<=[?&;])([\w.%-]+=)[^\s&;'\"]*(?:@|%40)", re.IGNORECASE)
_AZURE = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes with the name of a container in front of @."""


def redact(text: str) -> str:
    """Return `text` with `***` in place of what its URIs say of users, passwords, keys and tokens.

    A user goes even without a password, because many services take a token there. Other texts stay as they are.
    """
    text = _USER_INFO.sub(_without_user, text)
    text = _OPTION.sub(rf"\g<1>{_HIDDEN}", text)
    return _OPTION_WITH_USER.sub(rf"\g<1>{_HIDDEN}@", text)


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match["scheme"], match["user"]
    if not user or (scheme.lower() in _AZURE and ":" not in user):
        return match[0]
    return f"{scheme}://{_HIDDEN}@"


class RedactedRepr:
    """Gives a dataclass with `repr=False` a repr without secrets."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = (f"{f.name}={redact(repr(getattr(self, f.name)))}" for f in fields if f.repr)
        return f"{type(self).__name__}({', '.join(values)})"
