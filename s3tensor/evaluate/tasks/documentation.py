"""Documents of the tasks on the standard library's documentation, held-out topics only.

They are made from the Python that runs, so figures of one Python release compare with each other. What the
other parts hold as well, which a model may be calibrated on, is left out.
"""

from __future__ import annotations

import random
from typing import Any

from s3tensor.text.text import pydoc_topics

PASSAGE = 4000  # characters, some 1000 tokens: a window of any model, so that windows compare
CONTEXT, CONTINUATION = 40, 10  # words
STRIDE = 120  # words from one question to the next
CHOICES = 4


def passages(**_: Any) -> Any:
    """Passages of whole paragraphs, in a fixed shuffled order: ``page``."""
    found = []
    for text in pydoc_topics("held-out").values():
        passage = ""
        for paragraph in text.strip().split("\n\n"):
            if passage and len(passage) + 2 + len(paragraph) > PASSAGE:
                found.append(passage)
                passage = ""
            passage += ("\n\n" if passage else "") + paragraph
        if passage:
            found.append(passage)
    random.Random(0).shuffle(found)  # the first few, as under --limit, are of many topics
    return _test_split([{"page": page} for page in found])


def questions(**_: Any) -> Any:
    """How a passage goes on, against three pieces of the same topic: ``passage, choices, answer``."""
    draw = random.Random(0)
    found = []
    known = _known()
    for text in pydoc_topics("held-out").values():
        words = text.split()
        last = len(words) - CONTINUATION
        for place in range(CONTEXT, last + 1, STRIDE):
            # Neither in the passage or its continuation nor cut by them.
            elsewhere = [
                start
                for start in range(last + 1)
                if start + CONTINUATION <= place - CONTEXT or start >= place + CONTINUATION
            ]
            right = " ".join(words[place : place + CONTINUATION])
            passage = " ".join(words[place - CONTEXT : place])
            if right in known or passage in known:
                continue
            pieces = {right}
            for start in draw.sample(elsewhere, len(elsewhere)):
                if len(pieces) == CHOICES:
                    break
                pieces.add(" ".join(words[start : start + CONTINUATION]))
            if len(pieces) < CHOICES:  # a topic of a few words
                continue
            choices = sorted(pieces)
            draw.shuffle(choices)
            found.append({"passage": passage, "choices": choices, "answer": choices.index(right)})
    draw.shuffle(found)
    return _test_split(found)


def _known() -> str:
    """The text of the other parts, with single spaces."""
    parts = (pydoc_topics(part).values() for part in ("calibration", "development"))
    return " ".join(" ".join(text.split()) for topics in parts for text in topics)


def _test_split(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(rows)})
