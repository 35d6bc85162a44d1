"""Manuals: which paragraphs of a document are prose, and the documents of all manuals."""

from __future__ import annotations

from pathlib import Path

import pytest

from permllm.data import manuals
from permllm.data.manuals import prose
from permllm.data.texts import TEXTS
from tests.data.test_texts import words_in_a_row

DOCUMENT = """
==================================
A heading of more than ten words, which is long enough to be prose but for its frame of signs
==================================

.. module:: one
   :synopsis: The directive has more than ten words, and it ends with a full stop.

Use the :class:`~django.http.Request` class, or :ref:`the guide <guide-label>`, to *read* ``x`` and
the `home page <https://a.b/c>`_ of it::

    for line in file: print(line, and, more, words, that, make, this, code, long, enough)

* An item of a list is a paragraph too, if it has enough words
  and a **strong** end.

.. note::

    A note that is indented is prose, since its words make a sentence like any other.

This one is too short.

| column | another | a table has no prose even if its cells have many words in them. |

In Markdown a [link to a page](other.md) leaves its words, and one `literal` its content!
"""


def test_prose_is_sentences_without_markup() -> None:
    assert prose(DOCUMENT) == [
        "Use the django.http.Request class, or the guide, to read x and the home page of it:",
        "An item of a list is a paragraph too, if it has enough words and a strong end.",
        "A note that is indented is prose, since its words make a sentence like any other.",
        "In Markdown a link to a page leaves its words, and one literal its content!",
    ]


def test_no_paragraph_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "The number {} stands in this sentence of more than ten common words."
    first, second, third = map(sentence.format, (1, 2, 3))
    contents = {"a.rst": [first, second, first], "b.rst": [first], "c.txt": [second, third]}
    for name, paragraphs in contents.items():
        (tmp_path / name).write_text("\n\n".join(paragraphs))
    monkeypatch.setattr(manuals, "source_documents", lambda _: sorted(tmp_path.iterdir()))
    manuals.manuals.cache_clear()
    try:
        assert TEXTS["manuals"].calibration(seed=0) == [f"{first}\n\n{second}", third]
    finally:
        manuals.manuals.cache_clear()


@pytest.mark.usefixtures("downloads")
def test_the_manuals_share_no_thirteen_words_with_texts_that_are_measured() -> None:
    documents = TEXTS["manuals"].calibration(seed=0)
    assert 1_090_000 < sum(len(document.split()) for document in documents) < 1_100_000
    words = set[str]().union(*map(words_in_a_row, documents))
    for name in ("boolq-passages", "sciq-support", "law-questions", "coqa-stories"):
        assert words.isdisjoint(words_in_a_row(TEXTS[name].evaluation())), name
