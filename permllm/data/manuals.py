"""Prose of manuals: documentation in reStructuredText or Markdown without its markup."""

import re
from functools import cache

from permllm.data.package_index import Source, source_documents

_PYPI = "https://files.pythonhosted.org/packages"
# Their licences are BSD-3-Clause, MIT, Apache-2.0 and BSD-3-Clause; together they have 46 MB.
SOURCES = (
    Source(
        f"{_PYPI}/55/79/49a609ea76ec51404b482932e33f1e6858946b920232c11b11a25bea3032/"
        "django-6.1.3.tar.gz",
        "b5d2d9e35295065d13b1927b3f19a59bd119f737aa6299def14ccca1ae3c8c0d",
    ),
    Source(
        f"{_PYPI}/3f/69/b87a540f6888ebc1f63a6e6138e8dc0827331a9be7c5eb15e3bd40a76281/"
        "sqlalchemy-2.1.9.tar.gz",
        "d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28",
    ),
    Source(
        f"{_PYPI}/22/59/89f6c11ac3112244712c7085ff5af4811d8cfb3c475346f2ee69c5d6db52/"
        "salt-3008.5.tar.gz",
        "0259deafd601d783721e5aa8ed10677d8c4d6cc12f5de17499af71590d593315",
    ),
    Source(
        f"{_PYPI}/83/d3/803453b36afefb7c2bb238361cd4ae6125a569b4db67cd9e79846ba2d68c/"
        "sympy-1.14.0.tar.gz",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
    ),
)
# A paragraph with fewer words is often a heading or a part of a table.
_WORDS = 10
# Markup that leaves words behind: bullets, roles, links, literals, emphasis.
_MARKUP = (
    (re.compile(r"^(?:[*+-]|#\.|\d+\.) "), ""),
    (re.compile(r":[\w:+.-]+:`[~!.]*(?:_\w+\.)?([^`<]*?) ?(?:<[^`>]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?) ?<[^`>]*>`__?"), r"\1"),
    (re.compile(r"\[([^][]+)\]\([^()]*\)"), r"\1"),
    (re.compile(r"``?([^`]+)``?_{0,2}"), r"\1"),
    (re.compile(r"(\*{1,2})(\S(?:[^*]*\S)?)\1"), r"\2"),
    (re.compile(r" ?::"), ":"),
)
# Signs of code, directives, tables and lists of changes.
_NO_PROSE = re.compile(r"[{}<>=|\\^#;`]|\.\. |__|--")


@cache
def manuals() -> list[str]:
    """Return the prose of each file of the manuals; no paragraph comes twice."""
    seen = set[str]()
    documents = []
    for source in SOURCES:
        for file in source_documents(source):
            paragraphs = prose(file.read_text("utf-8", errors="replace"))
            new = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
            seen.update(new)
            if new:
                documents.append("\n\n".join(new))
    return documents


def prose(document: str) -> list[str]:
    """Return the paragraphs of a document that are sentences, each in one line without markup.

    A paragraph is prose if it has ten words, begins with a letter, ends like a sentence, and has no
    sign that is usual in code. Headings, code, tables and directives are not.
    """
    paragraphs = []
    for block in re.split(r"\n\s*\n", document):
        text = " ".join(block.split())
        for markup, words in _MARKUP:
            text = markup.sub(words, text)
        long_enough = len(text.split()) >= _WORDS
        if long_enough and text[0].isalpha() and text[-1] in ".:?!" and not _NO_PROSE.search(text):
            paragraphs.append(text)
    return paragraphs
