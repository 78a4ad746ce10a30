"""The byte tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_edge.errors import TokenizerError
from rwkv_edge.tokenizers import ByteTokenizer


@given(text=st.text())
def test_tokens_are_the_utf8_bytes(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_description():
    tokenizer = ByteTokenizer()
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_ids) == ("bytes", 256, frozenset())
    assert [tokenizer.token_bytes(token) for token in (0, 65, 255)] == [b"\0", b"A", b"\xff"]
    assert tokenizer.decode([0x41, 0xFF, 0x42]) == "A\ufffdB"


@pytest.mark.parametrize("token", [-1, 256])
def test_ids_outside_are_refused(token):
    with pytest.raises(TokenizerError, match="0 to 255"):
        ByteTokenizer().token_bytes(token)


def test_lone_surrogates_are_refused():
    with pytest.raises(TokenizerError, match=r"character 1 is the lone surrogate U\+DC80"):
        ByteTokenizer().encode("a\udc80")
