"""Conversations: what is shown, and that the state has read just that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import STEP_ONLY

from rwkv_edge.cli import run
from rwkv_edge.errors import InputError, SessionError, StateError, TokenizerError
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.runtime.chat import Chat, Turn
from rwkv_edge.runtime.chat_draft import Visible
from rwkv_edge.runtime.chat_templates import TEMPLATES, template_for
from rwkv_edge.runtime.open import OpenModel, open_model
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.snapshot import save_snapshot

WORLD = TEMPLATES["world"]


@pytest.fixture(scope="module")
def model(artifacts: Path) -> OpenModel:
    """Bytes as tokens; no chunks, so that the same tokens give the same bits."""
    return open_model(artifacts / "one", threads=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    """World's vocabulary, where a token can hold the end of a sentence and the end of a turn."""
    folder = tmp_path_factory.mktemp("world")
    save_pth(random_v7(Shape7(1, 64, 65536)), folder / "model.pth")
    assert run(["export", str(folder / "model.pth"), "-o", str(folder / "artifact"), *STEP_ONLY]) == 0
    return open_model(folder / "artifact", threads=1)


class Script(Sampler):
    """Draws what it is told, whatever the logits say."""

    def __init__(self, tokens: Iterator[int]) -> None:
        super().__init__(SamplerConfig())
        self._told = tokens

    def sample(self, logits: np.ndarray) -> int:
        assert logits.ndim == 1
        return next(self._told)


def scripted(model: OpenModel, *answers: str | bytes | list[int], **options: Any) -> Chat:
    """A chat whose model gives these answers."""
    left = iter(answers)

    def sampler(_: SamplerConfig) -> Sampler:
        answer = next(left)
        if isinstance(answer, str):
            answer = model.tokenizer.encode(answer)
        return Script(iter(list(answer)))

    return Chat(model, options.pop("template", WORLD), sampler=sampler, **options)


def said(chat: Chat, text: str, stop: Callable[[], bool] = lambda: False) -> tuple[str, str]:
    """The answer's text, and why it ended."""
    return drained(chat.ask(text, stop))


def drained(pieces: Any) -> tuple[str, str]:
    text = ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            return text, end.value


def assert_has_read(chat: Chat, text: str) -> None:
    """The state is, to the bit, that of a session that read ``text``."""
    session, tokens = chat._session, chat._model.tokenizer.encode(text)
    state = session.initial_state(1)
    session.prefill([tokens], state)
    expected = session.export_state(state)
    for name, array in session.export_state(chat.state).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert chat.history.tokens == len(tokens)
    assert list(chat.history.last) == tokens[-64:]


STOPPED = {
    "by the user's name": "It is blue.\n\nUser: and you?",
    "after line breaks that were no stop": "One\n\nTwo\n\nUs and User\n\nUser:x",
    "at once": "\n\nUser:",
    "within a character's bytes": "Grüße 世界\n\nUser:",
}


@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize("which", ["model", "world"])
def test_stop_strings_are_neither_shown_nor_read(name: str, which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    shown = STOPPED[name].rpartition("\n\nUser:")[0]
    chat = scripted(model, STOPPED[name], " Yes\n\nUser:")
    pieces = list(chat.ask("What colour is the sky?"))
    assert "".join(pieces) == shown
    assert chat.turns == [Turn("What colour is the sky?", shown)]
    first = f"User: What colour is the sky?\n\nAssistant:{shown}\n\n"
    assert_has_read(chat, first)
    assert said(chat, "Sure?") == (" Yes", "stop_text")
    assert_has_read(chat, first + "User: Sure?\n\nAssistant: Yes\n\n")


@pytest.mark.parametrize(("answer", "token"), [(" 青。", "。\n"), (" Blue ", " \n\n")])
def test_a_token_that_holds_the_end_of_the_text_and_of_the_turn(answer: str, token: str, world: OpenModel) -> None:
    """What it shows stays read; what was held back is read as the end of the turn."""
    tokens = world.tokenizer.encode(f"{answer}\n\nUser:")
    assert token.encode() in [world.tokenizer.token_bytes(t) for t in tokens]
    chat = scripted(world, tokens)
    assert said(chat, "Sky?") == (answer, "stop_text")
    assert_has_read(chat, f"User: Sky?\n\nAssistant:{answer}\n\n")


def test_the_end_of_text_ends_the_turn(world: OpenModel) -> None:
    end = [0]
    chat = scripted(world, world.tokenizer.encode(" Blue.") + end, world.tokenizer.encode(" Red\n\n") + end)
    assert said(chat, "Sky?") == (" Blue.", "stop_token")
    assert_has_read(chat, "User: Sky?\n\nAssistant: Blue.\n\n")
    assert said(chat, "Fire?") == (" Red", "stop_token")  # its line breaks are the turn's end
    assert_has_read(chat, "User: Sky?\n\nAssistant: Blue.\n\nUser: Fire?\n\nAssistant: Red\n\n")


def test_text_that_only_began_a_stop_is_shown_in_the_end(model: OpenModel) -> None:
    text = " a\n\nUse"
    chat = scripted(model, text, max_tokens=len(text))
    assert said(chat, "x") == (text, "length")
    assert_has_read(chat, f"User: x\n\nAssistant:{text}\n\n")


def test_half_a_character_is_neither_shown_nor_read(model: OpenModel) -> None:
    cut = "世界".encode()[:5]
    chat = scripted(model, cut, max_tokens=len(cut))
    assert said(chat, "x") == ("世", "length")
    assert_has_read(chat, "User: x\n\nAssistant:世\n\n")


@pytest.mark.parametrize("after", range(1, 9))
def test_an_answer_can_be_stopped_after_any_token(after: int, model: OpenModel) -> None:
    chat = scripted(model, "é\n\nUsx. and more", "b\n\nUser:")
    asked = iter([*[False] * after, *[True] * 100])  # once while the text is read (no chunks: once a token)
    reading = len(model.tokenizer.encode(WORLD.user_text("x")))
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > reading and next(asked)

    shown, reason = said(chat, "x", stop)
    assert reason == "interrupted"
    assert "é\n\nUsx. and more".startswith(shown)
    assert not shown.endswith("\n")
    assert_has_read(chat, f"User: x\n\nAssistant:{shown}\n\n")
    assert said(chat, "y") == ("b", "stop_text")


def test_an_answer_whose_reader_leaves(model: OpenModel) -> None:
    chat = scripted(model, "abc\n\nUser:")
    pieces = chat.ask("x")
    assert next(pieces) == "a"
    pieces.close()
    assert_has_read(chat, "User: x\n\nAssistant:a\n\n")


def test_stopped_while_the_text_is_read(model: OpenModel) -> None:
    chat = scripted(model, "a\n\nUser:", "b\n\nUser:")
    said(chat, "x")
    before = chat.history
    assert said(chat, "a long text", lambda: True) == ("", "interrupted")
    assert chat.history == before
    assert len(chat.turns) == 1
    assert drained(chat.retry()) == ("b", "stop_text")  # of the turn before


def test_a_turn_that_fails_does_not_count(model: OpenModel) -> None:
    chat = scripted(model, "a\n\nUser:", [97, 98, 999])
    said(chat, "x")
    with pytest.raises((InputError, SessionError)):
        said(chat, "y")
    assert chat.turns == [Turn("x", "a")]
    assert_has_read(chat, "User: x\n\nAssistant:a\n\n")
    for text, error in ((" \n", InputError), ("\ud800", TokenizerError)):
        with pytest.raises(error):
            said(chat, text)
    assert_has_read(chat, "User: x\n\nAssistant:a\n\n")


def test_try_again_forks_the_state(model: OpenModel) -> None:
    chat = scripted(model, "a\n\nUser:", "b\n\nUser:", "c\n\nUser:", "d\n\nUser:")
    with pytest.raises(InputError, match="there is no answer to try again"):
        chat.retry().send(None)
    said(chat, "x")
    said(chat, "x")  # the same text twice: only the last is tried again
    for answer in ("c", "d"):
        assert drained(chat.retry()) == (answer, "stop_text")
        assert [turn.answer for turn in chat.turns] == ["a", answer]
        assert_has_read(chat, f"User: x\n\nAssistant:a\n\nUser: x\n\nAssistant:{answer}\n\n")


def test_seeds_differ_between_answers_and_repeat_between_chats(model: OpenModel) -> None:
    def talk() -> list[str]:
        chat = Chat(model, TEMPLATES["none"], sampling=SamplerConfig(seed=1), max_tokens=20)
        return [said(chat, "x")[0], drained(chat.retry())[0]]

    assert talk() == talk()
    assert len(set(talk())) == 2


def test_system_prompt_and_reset(model: OpenModel) -> None:
    g1 = TEMPLATES["g1"]
    chat = scripted(model, "a\n\nUser:", template=g1, system=" Be\n\n\nbrief. ")
    assert_has_read(chat, "System: Be\nbrief.\n\n")
    said(chat, "one\r\n\r\ntwo {}\n")
    assert_has_read(chat, "System: Be\nbrief.\n\nUser: one\ntwo {}\n\nAssistant:a\n\n")
    chat.reset()
    assert_has_read(chat, "System: Be\nbrief.\n\n")
    assert chat.turns == []
    with pytest.raises(InputError):
        chat.retry().send(None)
    with pytest.raises(InputError, match="max_tokens must be at least 1"):
        Chat(model, g1, max_tokens=0)


def test_thoughts_are_read_but_not_seen(model: OpenModel) -> None:
    chat = scripted(model, ">\nhm\n</think>\nBlue.\n\nUser:", template=TEMPLATES["g1-think"])
    visible = Visible(thinking=True)
    assert "".join(visible.push(piece) for piece in chat.ask("Sky?")) == "Blue."
    assert chat.turns[0].answer == " <think>\nhm\n</think>\nBlue."
    assert_has_read(chat, "User: Sky?\n\nAssistant: <think>\nhm\n</think>\nBlue.\n\n")


@pytest.mark.parametrize("size", range(1, 12))
def test_where_thoughts_are_cut_does_not_matter(size: int) -> None:
    text = "> a </thin </think>\n\n b </think> c"
    visible, parts = Visible(True), [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(visible.push(part) for part in parts) == "b </think> c"
    shown = Visible(False)
    assert "".join(shown.push(part) for part in (" ", "\n", " a ", " b")) == "a  b"


def test_templates_of_names() -> None:
    names = {
        "rwkv7-g1a-0.1b-20250728-ctx4096.pth": "g1",
        "rwkv7-g0a3-7.2b.pth": "g1",
        "RWKV-x070-World-0.1B-v2.8.pth": "world",
        "RWKV-4-Raven-7B-v12.pth": "raven",
        "rwkv7-shakespeare-3M.safetensors": "none",
        "g12-large.pth": "none",
    }
    assert {name: template_for(name, "bytes").name for name in names} == names
    assert template_for("model.pth", "world").name == "world"


def test_raven_and_none(model: OpenModel) -> None:
    chat = scripted(model, " Hi.\n\nBob:", template=TEMPLATES["raven"], system="A talk.")
    assert said(chat, "Hello") == (" Hi.", "stop_text")
    assert_has_read(chat, "A talk.\n\nBob: Hello\n\nAlice: Hi.\n\n")
    plain = scripted(model, "b\n\nUser:", template=TEMPLATES["none"], max_tokens=8)
    assert said(plain, "a ") == ("b\n\nUser:", "length")
    assert_has_read(plain, "a b\n\nUser:")


# Files


def test_save_and_load(model: OpenModel, tmp_path: Path) -> None:
    path = tmp_path / "talk.state"
    chat = scripted(model, "a\n\nUser:", "c\n\nUser:", template=TEMPLATES["g1"], system="Be brief.")
    said(chat, "x")
    chat.save(path)
    other = scripted(model, "z\n\nUser:", "c\n\nUser:")
    said(other, "something else")
    other.load(path)
    assert (other.turns, other.system, other.template.name) == ([Turn("x", "a")], "Be brief.", "g1")
    said(chat, "y")
    said(other, "y")
    assert_has_read(other, "System: Be brief.\n\nUser: x\n\nAssistant:a\n\nUser: y\n\nAssistant:c\n\n")
    other.load(path)
    with pytest.raises(InputError, match="no answer to try again"):
        other.retry().send(None)
    other.reset()
    assert_has_read(other, "System: Be brief.\n\n")


@pytest.mark.parametrize(
    "note",
    [
        {"template": "g1", "system": None, "turns": [["a"]]},
        {"template": "g9", "system": None, "turns": []},
        {"template": "g1", "system": 1, "turns": []},
        {"template": "g1", "system": None, "turns": [["a", 1]]},
        {"template": ["g1"], "system": None, "turns": []},
        {"template": "g1", "turns": []},
        [],
        "text",
    ],
)
def test_conversations_that_cannot_be_read(note: Any, model: OpenModel, tmp_path: Path) -> None:
    chat = scripted(model, "a\n\nUser:")
    said(chat, "x")
    save_snapshot(tmp_path / "odd.state", model.session, chat.state, [chat.history], notes={"chat": note})
    with pytest.raises(StateError, match=r"odd\.state holds no conversation that can be read"):
        chat.load(tmp_path / "odd.state")
    save_snapshot(tmp_path / "plain.state", model.session, chat.state, [chat.history])
    with pytest.raises(StateError, match=r"plain\.state is a state without a conversation"):
        chat.load(tmp_path / "plain.state")
    assert_has_read(chat, "User: x\n\nAssistant:a\n\n")


def test_a_conversation_with_another_model(model: OpenModel, artifacts: Path, tmp_path: Path) -> None:
    chat = scripted(model, "a\n\nUser:")
    chat.save(tmp_path / "talk.state")
    other = Chat(open_model(artifacts / "other", threads=1), WORLD)
    with pytest.raises(StateError, match="is a state of another model"):
        other.load(tmp_path / "talk.state")
