"""The default corpus."""

from __future__ import annotations

import functools
import hashlib
import operator
import re
import subprocess
import sys
import textwrap as textwrap_module
from collections import Counter

import pytest

from lmexp.contracts import UserError
from lmexp.corpus.pydocs import PyDocs


@pytest.fixture(scope="module")
def corpus():
    return PyDocs()


def test_it_is_about_two_megabytes_of_documents(corpus):
    texts = [text for _, text in corpus.documents]
    assert 1.2e6 < sum(len(text.encode()) for text in texts) < 4e6
    assert len(texts) > 200


def test_it_reads_what_python_says_of_itself(corpus):
    """ast's text against that of the imported object."""
    text = dict(corpus.documents)["module:textwrap"]
    assert textwrap_module.dedent(textwrap_module.fill.__doc__ or "").strip()[:40] in text
    assert "TextWrapper._handle_long_word(self, reversed_chunks, cur_line, cur_len, width)" in text


def test_no_paragraph_stands_in_two_documents(corpus):
    heading = re.compile(r"[\w.]+\(.*\)")  # two modules may have a function of the same name and arguments
    count = Counter()
    for _, text in corpus.documents:
        paragraphs = {" ".join(p.split()) for p in text.replace("\n \n", "\n\n").split("\n\n")}
        count.update(p for p in paragraphs if len(p) >= 40 and not heading.fullmatch(p))
    assert [p for p, n in count.items() if n > 1] == []


def test_splits_are_a_partition_that_does_not_move(corpus):
    parts = {split: corpus.rows(split)["text"][:] for split in corpus.splits}
    assert sorted(functools.reduce(operator.iadd, parts.values(), [])) == sorted(text for _, text in corpus.documents)
    validation, test = (sum(len(t.encode()) for t in parts[s]) for s in ("validation", "test"))
    assert validation > 30_000
    assert test > 30_000
    more = PyDocs(validation=0.05, test=0.2)
    names = [name for name, _ in corpus.documents]
    assert all(more._split_of(n) == "validation" for n in names if corpus._split_of(n) == "validation")


def test_another_process_makes_the_same(corpus):
    code = "from lmexp.corpus.pydocs import PyDocs; import hashlib; c = PyDocs(); d = repr(c.documents).encode(); "
    code += "print(c.fingerprint(), hashlib.sha256(d).hexdigest())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [corpus.fingerprint(), hashlib.sha256(repr(corpus.documents).encode()).hexdigest()]


def test_fractions_are_checked_and_missing_splits_named():
    with pytest.raises(UserError, match=r"corpus.validation=0.6"):
        PyDocs(validation=0.6, test=0.4)
    with pytest.raises(UserError, match=r"no test split"):
        PyDocs(test=0.0).rows("test")


def test_the_corpora_do_not_import_torch():
    code = "import sys, lmexp.corpus.pydocs, lmexp.corpus.files, lmexp.corpus.hub; "
    code += "print({'torch', 'datasets'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
