"""Which tokenizer for which model, and the tokenizer inside an artifact."""

import pytest

from rwkv_edge.errors import ArtifactError, TokenizerError
from rwkv_edge.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    WorldTokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_for_vocabulary,
)


@pytest.fixture
def json_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "mine.json"))
    return tmp_path / "mine.json"


@pytest.mark.parametrize(
    ("size", "choice", "kind"),
    [
        (256, None, ByteTokenizer),
        (65536, None, WorldTokenizer),
        (65530, None, WorldTokenizer),
        (65536, "world", WorldTokenizer),
        (70000, "world", WorldTokenizer),
        (65536, "bytes", ByteTokenizer),
    ],
)
def test_chosen_tokenizer(size, choice, kind):
    assert type(tokenizer_for_vocabulary(size, choice)) is kind


def test_chosen_files(json_file):
    assert isinstance(tokenizer_for_vocabulary(50277, str(json_file)), HuggingFaceTokenizer)
    vocabulary = WorldTokenizer().vocabulary
    chosen = tokenizer_for_vocabulary(65536, str(vocabulary))
    assert isinstance(chosen, WorldTokenizer)
    assert chosen.vocabulary == vocabulary


@pytest.mark.parametrize("size", [50277, 50304])
def test_the_20b_vocabulary_needs_its_file(size):
    with pytest.raises(TokenizerError, match=rf"{size} is the 20B .*tokenizer\.json with --tokenizer FILE"):
        tokenizer_for_vocabulary(size)


@pytest.mark.parametrize("size", [1, 255, 257, 32000, 65529, 65537])
def test_other_sizes_need_a_file(size):
    with pytest.raises(TokenizerError, match=rf"not {size}; give .*--tokenizer FILE"):
        tokenizer_for_vocabulary(size)


@pytest.mark.parametrize(("size", "choice"), [(50277, "world"), (65529, "world"), (255, "bytes")])
def test_a_tokenizer_larger_than_the_model_is_refused(size, choice):
    with pytest.raises(TokenizerError, match=f"'{choice}' has ids up to .* has {size}"):
        tokenizer_for_vocabulary(size, choice)


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="no file 'llama'"):
        tokenizer_for_vocabulary(65536, "llama")
    with pytest.raises(TokenizerError, match="no file"):
        tokenizer_for_vocabulary(65536, str(tmp_path))


def test_saved_and_loaded(tmp_path, json_file):
    folder = tmp_path / "artifact"
    folder.mkdir()
    entries = [save_tokenizer(t, folder) for t in (WorldTokenizer(), ByteTokenizer(), HuggingFaceTokenizer(json_file))]
    assert entries == [
        {"kind": "world", "file": "rwkv_vocab_v20230424.txt"},
        {"kind": "bytes", "file": None},
        {"kind": "huggingface", "file": "tokenizer.json"},
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["rwkv_vocab_v20230424.txt", "tokenizer.json"]
    text = "Grüße, 世界\n\n😀"
    for entry in entries:
        tokenizer = load_tokenizer(folder, entry)
        assert tokenizer.kind == entry["kind"]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert save_tokenizer(tokenizer, folder) == entry  # onto itself


@pytest.mark.parametrize(
    "entry", [{}, {"kind": "tiktoken", "file": "x"}, {"kind": None}, {"kind": ["world"]}, None, "world"]
)
def test_bad_entries_are_refused(tmp_path, entry):
    with pytest.raises(TokenizerError, match="must be world, bytes or huggingface"):
        load_tokenizer(tmp_path, entry)


@pytest.mark.parametrize("file", [None, 3, "", ".", "..", "../secret.txt", "/etc/hosts", "a/b", "a\\b", "C:x", "a\0b"])
@pytest.mark.parametrize("kind", ["world", "huggingface"])
def test_files_outside_the_folder_are_refused(tmp_path, kind, file):
    with pytest.raises(TokenizerError, match="must be a name in the folder"):
        load_tokenizer(tmp_path, {"kind": kind, "file": file})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"lacks its tokenizer file 'tokenizer\.json'"):
        load_tokenizer(tmp_path, {"kind": "huggingface", "file": "tokenizer.json"})


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be copied"):
        save_tokenizer(WorldTokenizer(), tmp_path / "nowhere")


def test_a_tokenizer_of_another_kind_cannot_be_saved(tmp_path):
    class Own(Tokenizer):
        kind = "own"

        def encode(self, text):
            return []

        def token_bytes(self, token):
            return b""

    with pytest.raises(TokenizerError, match="kind 'own' cannot be saved"):
        save_tokenizer(Own(), tmp_path)
