"""Limits of JSON that cost memory: they are checked before it is parsed."""

import json

import pytest

from sb3_ppo_plus import UntrustedFileError
from sb3_ppo_plus.untrusted.strict_json import Limits, parse


@pytest.mark.parametrize(
    "value",
    [[[]] * 10, [{}] * 10, {str(key): 0 for key in range(10)}, [0] * 10, [[0, 0]] * 4, {"a": [[[[[[[[[0]]]]]]]]]}],
    ids=str,
)
def test_values_lists_and_objects_are_counted(value, monkeypatch):
    text = json.dumps(value).encode()
    assert parse(text, "a file", Limits(max_values=21)) == value
    monkeypatch.setattr(json, "loads", lambda *args, **kwargs: pytest.fail("parsed"))
    with pytest.raises(UntrustedFileError, match="a file holds more than 9 values"):
        parse(text, "a file", Limits(max_values=9))


def test_marks_inside_texts_are_no_values():
    assert parse(b'"[[[,,,{{{"', "a file", Limits(max_values=1)) == "[[[,,,{{{"


def test_bytes_are_limited():
    assert parse(b"  1", "a file", Limits(max_bytes=3)) == 1
    with pytest.raises(UntrustedFileError, match="has 4 bytes; at most 3"):
        parse(b"   1", "a file", Limits(max_bytes=3))


@pytest.mark.parametrize("text", [b"]" * 10**7, b"}" * 10**7, b"[]]" + b"]" * 10**7], ids=["]", "}", "[]]"])
def test_what_closes_more_than_it_opens_is_not_read_to_its_end(text):
    with pytest.raises(UntrustedFileError, match="closes more than it opens"):
        parse(text, "a file")
