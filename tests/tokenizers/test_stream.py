"""Incremental text and stop strings, against decoding and searching the whole at once."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rwkv_edge.errors import InputError, TokenizerError
from rwkv_edge.tokenizers import ByteTokenizer, StopText, TextStream, WorldTokenizer


class Pieces(ByteTokenizer):
    """Tokens that stand for given pieces of bytes."""

    def __init__(self, pieces):
        super().__init__()
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def token_bytes(self, token):
        return self.pieces[token]


def utf8_and_worse():
    broken = st.sampled_from(
        [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\x80", b"\x80", b"\xf4\x90"]
    )
    parts = st.one_of(st.text(max_size=5).map(str.encode), st.binary(max_size=4), broken)
    return st.lists(parts, max_size=8).map(b"".join)


def split(data, cuts):
    cuts = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(cuts)]


@given(data=utf8_and_worse(), cuts=st.lists(st.integers(0, 60), max_size=20))
@example(data="😀é日".encode(), cuts=list(range(10)))
def test_any_split_gives_the_text_of_the_whole(data, cuts):
    pieces = split(data, cuts)
    stream = TextStream(Pieces(pieces))
    text = "".join(stream.push(token) for token in range(len(pieces))) + stream.flush()
    assert text == data.decode("utf-8", "replace")
    assert stream.flush() == ""


@given(text=st.text())
def test_only_complete_characters_are_released(text):
    stream = TextStream(ByteTokenizer())
    released = ""
    for count, byte in enumerate(text.encode(), start=1):
        released += stream.push(byte)
        assert released == text.encode()[:count].decode("utf-8", "ignore")
    assert stream.flush() == ""


def test_unfinished_character_at_the_end():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in b"a\xf0\x9f"] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(0x62) == "b"


def test_ids_of_a_padded_embedding_have_no_text():
    stream = TextStream(WorldTokenizer())
    assert [stream.push(token) for token in (0, 65530, 65535)] == ["", "", ""]
    with pytest.raises(TokenizerError, match="not -1"):
        stream.push(-1)


def naive_stop(text, stops):
    """Text before the stop string that is completed first; the longest of those completed together."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(found)[1]], True) if found else (text, False)


@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=30),
)
@example(text="abcd", stops=["abcd", "bc"], cuts=[])
@example(text="aab", stops=["ab"], cuts=[1, 2, 3])
def test_any_split_stops_where_a_search_does(text, stops, cuts):
    stop_text = StopText(stops)
    released, met, whole = "", False, ""
    for piece in split(text, cuts):
        whole += piece
        free, met = stop_text.push(piece)
        released += free
        expected, expected_met = naive_stop(whole, stops)
        assert met == stop_text.met == expected_met
        held = "" if met else whole[len(released) :]
        assert released + held == expected
        # What is held back may begin a stop string, and nothing that may is released.
        assert not held or any(stop.startswith(held) for stop in stops)
        assert met or not any(stop.startswith(whole[at:]) for stop in stops for at in range(len(released)))
        if met:
            break
    assert released + stop_text.flush() == naive_stop(text, stops)[0]
    if met:
        assert stop_text.push("more") == ("", True)


def test_what_is_held_back():
    stop_text = StopText(["\n\nUser:"])
    assert [stop_text.push(piece) for piece in ("Hi\n", "\nUs", "a\n\nUser", ":x")] == [
        ("Hi", False),
        ("", False),
        ("\n\nUsa", False),
        ("", True),
    ]
    assert stop_text.flush() == ""


def test_no_stop_strings_hold_nothing_back():
    assert StopText([]).push("text") == ("text", False)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "User:"])
def test_bad_stop_strings_are_refused(stops):
    with pytest.raises(InputError, match="list of non-empty texts"):
        StopText(stops)
