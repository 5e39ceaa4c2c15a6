"""A folder's tokenizer is the one that its tokenizer.json describes, or is refused in one line."""

import json

import pytest
from conftest import byte_tokenizer

from sdpo.data import tokenizer_check
from sdpo.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
DAMAGE = {
    "missing": ("tokenizer.json", None, "holds no tokenizer.json; write one with"),
    "cut off": ("tokenizer.json", '{"version": ', "tokenizer.json is not valid JSON .*; copy it again"),
    "a pointer": ("tokenizer.json", POINTER, "tokenizer.json is a pointer of Git LFS, .*; fetch it with git lfs pull"),
    "something else": ("tokenizer.json", "{}", "tokenizer.json is damaged .*; copy it again"),
    "settings": ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
}


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def set_class(folder, name):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))


def test_a_sound_folder(folder):
    assert tokenizer_check.load(folder).get_vocab() == byte_tokenizer().get_vocab()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_in_one_line(folder, kind):
    name, content, sentence = DAMAGE[kind]
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        tokenizer_check.load(folder)
    assert "\n" not in str(error.value)


def test_a_class_that_reads_text_in_another_way(folder):
    """Qwen2's class splits digits and words apart, which this tokenizer.json with its merges of digits does not."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"]["12"] = 259
    described["model"]["merges"] = [["1", "2"]]
    file.write_text(json.dumps(described))
    assert tokenizer_check.load(folder)("12").input_ids == [259]
    set_class(folder, "Qwen2Tokenizer")
    with pytest.raises(UserError, match="Qwen2Tokenizer, which transformers chooses, read the same text as different"):
        tokenizer_check.load(folder)


@pytest.mark.parametrize(("legacy", "is_right"), [(True, True), (False, False), (None, False)])
def test_a_class_that_reads_words_behind_a_special_token_in_another_way(folder, legacy, is_right):
    """Llama 2's tokenizer.json puts a space before every piece of text, its class only before the first one."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    letters = sorted({*(tokenizer_check.PROBE + "Hi there").replace(" ", "\u2581")})
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: id for id, letter in enumerate(letters, 3)}
    described |= {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, space]},
        "pre_tokenizer": None,
        "decoder": None,
    }
    described["model"] |= {"vocab": vocab, "merges": []}
    described["added_tokens"] = described["added_tokens"][1:]
    file.write_text(json.dumps(described))
    set_class(folder, "LlamaTokenizer")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | ({} if legacy is None else {"legacy": legacy})))
    if is_right:
        tokenizer_check.load(folder)
    else:
        with pytest.raises(
            UserError, match="LlamaTokenizer, which transformers chooses, read the same text as different"
        ):
            tokenizer_check.load(folder)


def test_a_class_that_cannot_be_made(folder):
    set_class(folder, "GemmaTokenizer")
    with pytest.raises(UserError, match="the tokenizer of .* cannot be loaded"):
        tokenizer_check.load(folder)
