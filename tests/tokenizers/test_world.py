"""The World tokenizer against the `rwkv` package's, and its vocabulary file."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_edge.errors import TokenizerError
from rwkv_edge.tokenizers import WorldTokenizer
from rwkv_edge.tokenizers.world import VOCABULARY_FILE, read_vocabulary

TEXTS = [
    "",
    "\0",
    "\0a\0\0",
    "Hello, world!\n\nUser: hi\n\nAssistant:",
    "  leading,   runs of      spaces \t\t and tabs\r\n",
    "e\u0301 é Ångström straße ﬁ \u200b\u2028\u0085\ufeff end",
    "日本語のテキスト。中文文本，标点！한국어 العربية हिन्दी ไทย",
    "😀👩‍👩‍👧‍👦🇩🇪 \U0010ffff",
    "def f(x):\n    return x ** 2  # ½ ≤ ∞\n" * 20,
    "1234567890 3.14159 0x1F 1e-10",
    "'\"\\'\"\\n `it's`",
    "=" * 300 + "-" * 129 + " " * 1000,
]


@pytest.fixture(scope="module")
def world():
    return WorldTokenizer()


@pytest.fixture(scope="module")
def oracle():
    module = pytest.importorskip("rwkv.rwkv_tokenizer")
    return module.TRIE_TOKENIZER(str(Path(module.__file__).parent / VOCABULARY_FILE))


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_as_the_rwkv_package_and_back(world, oracle, text):
    tokens = world.encode(text)
    assert tokens == oracle.encode(text)
    assert world.decode(tokens) == text
    assert b"".join(map(world.token_bytes, tokens)) == text.encode()


@given(text=st.text(max_size=60))
def test_any_text_has_the_ids_of_the_rwkv_package(world, oracle, text):
    tokens = world.encode(text)
    assert tokens == oracle.encode(text)
    assert world.decode(tokens) == text


def test_every_token_has_the_bytes_of_the_rwkv_package(world, oracle):
    assert world.vocab_size == max(oracle.idx2token) + 1 == 65530
    assert [world.token_bytes(token) for token in range(1, world.vocab_size)] == [
        oracle.idx2token[token] for token in range(1, world.vocab_size)
    ]


def test_description(world):
    assert (world.kind, world.eos_ids) == ("world", frozenset({0}))
    assert world.token_bytes(0) == b""
    assert world.encode("\n\n") == [261]


def test_half_a_character_decodes_to_a_replacement(world):
    first, *rest = world.encode("😀")
    assert world.decode([first]) == "\ufffd"
    assert world.decode([first, *rest]) == "😀"


@pytest.mark.parametrize("token", [-1, 65530, 65535, 10**9])
def test_ids_outside_are_refused(world, token):
    with pytest.raises(TokenizerError, match=f"are 0 to 65529, not {token}"):
        world.token_bytes(token)


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff end"])
def test_lone_surrogates_are_refused(world, text):
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D"):
        world.encode(text)


def lines_of(tokens: dict[int, bytes]) -> list[str]:
    def literal(value: bytes) -> str:
        try:
            return repr(value.decode())
        except UnicodeDecodeError:
            return repr(value)

    return [f"{token} {literal(value)} {len(value)}" for token, value in tokens.items()]


@pytest.fixture
def small():
    """256 bytes, quotes of both kinds, escapes, a hole at ids 259 to 299."""
    tokens = {byte + 1: bytes([byte]) for byte in range(256)}
    return tokens | {257: b"ab", 258: b"abc", 300: 'it\'s "x" \\ \n é \u2028'.encode(), 301: "日本"[:1].encode()[:2]}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_vocabulary_of_ones_own(tmp_path, small, ending):
    path = tmp_path / "own.txt"
    path.write_bytes(ending.join([*lines_of(small), ""]).encode())
    tokenizer = WorldTokenizer(path)
    assert tokenizer.vocab_size == 302
    assert tokenizer.token_bytes(280) == b""
    assert [tokenizer.token_bytes(token) for token in small] == list(small.values())
    assert tokenizer.encode("abcabd") == [258, 257, 101]
    assert tokenizer.decode(tokenizer.encode('it\'s "x" \\ \n é \u2028 日本')) == 'it\'s "x" \\ \n é \u2028 日本'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("302 'ab c' 3", "not a string of 3 bytes"),
        ("302 '' 0", "not a string of 0 bytes"),
        ("302 17 2", "not a string"),
        ("302 'a'b' 3", "line 261"),
        ("302 ' 1", "line 261"),
        ("302 f(1) 2", "line 261"),
        ("302 'ab\\' 3", "line 261"),
        ("302 'zz", "line 261"),
        ("302", "line 261"),
        (f"302 {'(' * 9999} 2", "line 261"),
        ("302 {[]:1} 2", "line 261"),
        ("x 'zz' 2", "line 261"),
        ("0 'zz' 2", "not from 1 to 65535"),
        ("65536 'zz' 2", "not from 1 to 65535"),
        ("301 'zz' 2", "defines id 301 again"),
        ("302 'ab' 2", "1 tokens twice"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, small, line, message):
    path = tmp_path / "own.txt"
    path.write_text("\n".join([*lines_of(small), line]), encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        read_vocabulary(path)


def test_a_byte_without_token_is_refused(tmp_path, small):
    del small[100]
    path = tmp_path / "own.txt"
    path.write_text("\n".join(lines_of(small)), encoding="utf-8")
    with pytest.raises(TokenizerError, match="0x63"):
        WorldTokenizer(path)


def test_line_separators_inside_a_token(tmp_path, small):
    path = tmp_path / "own.txt"
    path.write_text("\n".join([*lines_of(small), "302 '\u2028\x85' 5"]), encoding="utf-8")
    assert read_vocabulary(path)[302] == "\u2028\x85".encode()


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"nothing\.txt cannot be read"):
        WorldTokenizer(tmp_path / "nothing.txt")
    (tmp_path / "latin.txt").write_bytes(b"1 '\xe9' 1\n")
    with pytest.raises(TokenizerError, match=r"latin\.txt cannot be read"):
        WorldTokenizer(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(TokenizerError, match="256 have none"):
        WorldTokenizer(tmp_path / "empty.txt")


def test_an_encoder_that_skips_lines_is_refused():
    tokenizer = WorldTokenizer()
    tokenizer._bytes = [*tokenizer._bytes, b"a token that the encoder does not know"]
    with pytest.raises(TokenizerError, match="skips lines"):
        tokenizer.encode("a")


def test_without_the_rust_package(world, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "pyrwkv_tokenizer", None)
    with pytest.raises(TokenizerError, match="pip install pyrwkv-tokenizer"):
        WorldTokenizer()
    tokenizer = WorldTokenizer(world.vocabulary)
    assert tokenizer.decode([33155]) == "Hello"
    with pytest.raises(TokenizerError, match="pip install pyrwkv-tokenizer"):
        tokenizer.encode("Hello")


def test_a_literal_that_only_python_reads_is_refused(tmp_path):
    """The Rust package panics on it, which is no Exception."""
    lines = [f"{byte + 1} b'\\x{byte:02x}' 1" for byte in range(256)]
    lines[ord("a")] = "98 b'a' 1"
    path = tmp_path / "vocabulary.txt"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TokenizerError, match="pyrwkv-tokenizer cannot read"):
        WorldTokenizer(path).encode("text")
