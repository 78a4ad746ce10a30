"""Hugging Face tokenizers, with small ones that the `tokenizers` package builds here."""

import json
import sys

import pytest

from rwkv_edge.errors import MissingDependencyError, TokenizerError
from rwkv_edge.tokenizers import HuggingFaceTokenizer, TextStream

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

LINES = ["hello world, hello there", "the quick brown fox", "Zwölf Boxkämpfer jagen Viktor", "日本語"] * 3
TEXTS = ["", "hello world", "  two  spaces\n\n", "😀 日本語 é\0\x7f", "Zwölf   hello!"]


@pytest.fixture
def byte_level(tmp_path):
    """Byte-level BPE as the 20B vocabulary: <|endoftext|> = 0, runs of spaces as added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("   ", normalized=False), AddedToken("é!", normalized=False)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json", tokenizer


@pytest.fixture
def sentencepiece(tmp_path):
    """BPE with byte fallback in the style of Llama; ids 262 to 299 are a hole."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocabulary |= {"▁": 259, "h": 260, "i": 261, "▁h": 300, "▁hi": 301}
    model = models.BPE(
        vocab=vocabulary, merges=[("▁", "h"), ("▁h", "i")], byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json", tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_round_trip(byte_level, text):
    path, original = byte_level
    original.no_truncation()
    original.no_padding()
    tokenizer = HuggingFaceTokenizer(path)
    tokens = tokenizer.encode(text)
    assert tokens == original.encode(text).ids
    assert tokenizer.decode(tokens) == text
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()


def test_byte_level_tokens_cover_all_bytes(byte_level):
    tokenizer = HuggingFaceTokenizer(byte_level[0])
    single = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single


def test_byte_level_special_and_added_tokens(byte_level):
    path, original = byte_level
    tokenizer = HuggingFaceTokenizer(path)
    assert (tokenizer.kind, tokenizer.eos_ids) == ("huggingface", frozenset({0}))
    assert tokenizer.vocab_size == original.get_vocab_size()
    assert tokenizer.token_bytes(0) == tokenizer.token_bytes(1) == b""
    assert tokenizer.token_bytes(original.token_to_id("   ")) == b"   "
    assert tokenizer.token_bytes(original.token_to_id("é!")) == "é!".encode()  # é is in the byte alphabet, as 0xE9
    assert tokenizer.encode("a<|endoftext|>") == [*tokenizer.encode("a"), 0]


def test_a_token_outside_the_byte_alphabet_is_its_text(byte_level, tmp_path):
    data = json.loads(byte_level[0].read_text(encoding="utf-8"))
    data["model"]["vocab"]["日"] = 400
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.vocab_size == 401
    assert tokenizer.token_bytes(400) == "日".encode()
    assert tokenizer.token_bytes(399) == b""


@pytest.mark.parametrize("text", ["hi", "hi hi", "h é 日本 😀", "hi\n\0"])
def test_sentencepiece_bytes(sentencepiece, text):
    path, original = sentencepiece
    tokenizer = HuggingFaceTokenizer(path)
    tokens = tokenizer.encode(text)
    assert tokens == original.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens) == " " + text  # the space that SentencePiece puts before a text
    assert original.decode(tokens) == text


def test_sentencepiece_tokens(sentencepiece):
    tokenizer = HuggingFaceTokenizer(sentencepiece[0])
    assert tokenizer.eos_ids == frozenset()
    assert tokenizer.vocab_size == 302
    assert tokenizer.token_bytes(301) == b" hi"
    assert tokenizer.token_bytes(3 + 0xE9) == b"\xe9"
    assert tokenizer.token_bytes(1) == b""
    assert tokenizer.token_bytes(280) == b""


def test_metaspace_decoder(sentencepiece):
    path, original = sentencepiece
    original.decoder = decoders.Metaspace(replacement="h")
    original.save(str(path))
    tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.token_bytes(301) == "▁ i".encode()
    assert tokenizer.token_bytes(3 + 0x41) == b"<0x41>"  # without the byte fallback it is text


def test_no_special_tokens_around_a_text(sentencepiece):
    path, original = sentencepiece
    before = original.encode("hi").ids
    original.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert original.encode("hi").ids == [1, *before, 2]
    original.save(str(path))
    assert HuggingFaceTokenizer(path).encode("hi") == before


def test_streaming_a_character_of_several_tokens(byte_level):
    tokenizer = HuggingFaceTokenizer(byte_level[0])
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("😀")]
    assert pieces[-1] == "😀"
    assert set(pieces[:-1]) == {""}


@pytest.mark.parametrize("token", [-1, 302])
def test_ids_outside_are_refused(sentencepiece, token):
    with pytest.raises(TokenizerError, match="0 to 301"):
        HuggingFaceTokenizer(sentencepiece[0]).token_bytes(token)


def test_lone_surrogates_are_refused(byte_level):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        HuggingFaceTokenizer(byte_level[0]).encode("\ud83d")


@pytest.mark.parametrize(
    "decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "Sequence", "decoders": []}]
)
def test_other_decoders_are_refused(byte_level, decoder):
    data = json.loads(byte_level[0].read_text(encoding="utf-8"))
    byte_level[0].write_text(json.dumps(data | {"decoder": decoder}), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json must be byte-level or SentencePiece style, not"):
        HuggingFaceTokenizer(byte_level[0])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"a": 1}', b'{"model": {"type": "what"}}', b"\xff\xfe", b"[" * 9999]
)
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"broken\.json"):
        HuggingFaceTokenizer(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"nothing\.json cannot be read"):
        HuggingFaceTokenizer(tmp_path / "nothing.json")


def test_without_the_package(byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rwkv-edge\[hf\]'"):
        HuggingFaceTokenizer(byte_level[0])
