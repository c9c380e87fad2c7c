"""Showing what a model wrote: every character as itself, never as markup.

Streamlit's markdown turns `![](https://…)` into a request to a foreign host, `[a](https://…)` into a link that hides
where it leads, `:red[…]` into colour and `$…$` into formulas. A model's text may hold any of it, copied from whatever
it was given to read. So no text of a model, a tool or a server goes through markdown: prose is shown as plain text,
and what stands between code fences as code.
"""

import re

import streamlit as st

from scripts.chat import printable

OPENING = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`]*)")


def pieces(text):
    """Cut text at its code fences: [("text", str) or ("code", str, language)]; an open fence runs to the end.

    language is None where the fence names none, or nothing that looks like a name.
    """
    found, lines, fence, language = [], [], "", None

    def close():
        body = "\n".join(lines)
        if fence:
            found.append(("code", body, language))
        elif body.strip():
            found.append(("text", body.strip("\n")))
        lines.clear()

    for line in text.split("\n"):
        opening = OPENING.fullmatch(line)
        if fence and re.fullmatch(rf" {{0,3}}{fence[0]}{{{len(fence)},}}[ \t]*", line):
            close()
            fence = ""
        elif not fence and opening:
            close()
            fence, name = opening[1], opening[2].strip()
            language = name if re.fullmatch(r"[A-Za-z0-9+#-]{1,20}", name) else None
        else:
            lines.append(line)
    close()
    return found


def plain(text):
    """`text` as a browser can be given it: control characters and what turns the reading direction as escapes."""
    return printable(str(text)).encode("utf-8", "backslashreplace").decode("utf-8")


def escaped(text):
    """`text` for places that read markdown (labels, badges, toasts): every ASCII punctuation mark as itself."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", plain(text))


def show(text):
    """Draw text that somebody else wrote."""
    for kind, body, *language in pieces(plain(text)):
        if kind == "code":
            st.code(body, language=language[0], wrap_lines=True)
        else:
            st.text(body)


def show_problem(text):
    """Draw an error message, which may quote what somebody else wrote."""
    with st.container(border=True, key=None):
        st.text(f"⚠ {plain(text)}")
