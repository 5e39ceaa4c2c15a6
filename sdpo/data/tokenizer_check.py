"""Loads the tokenizer of a folder and checks that it is the one that tokenizer.json describes."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sdpo.errors import UserError

# Classes of transformers split numbers, contractions, spaces, accents and scripts in ways of their own.
PROBE = (
    "Hello, I'm here.  What's 12345.67 + 8?\n\n\tdef f(x_1):\r\n    return x**2  # TODO\n"
    "Na\u00efve cafe\u0301, \u4f60\u597d \U0001f600 'S l'\u00e9t\u00e9 "
)

MOST_MARKS = 256  # added tokens behind which words are compared; some tokenizers reserve thousands


def load(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder with a tokenizer.json, or with code of its own if that is trusted.

    Raises UserError if a file is missing or damaged, and if the class that transformers chooses reads text as other
    tokens than tokenizer.json does.
    """
    settings = _read_json(folder / "tokenizer_config.json")
    own_code = trust_remote_code and "AutoTokenizer" in settings.get("auto_map", {})
    described = {} if own_code and not (folder / "tokenizer.json").is_file() else _read_tokenizer_json(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        ids = {text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in described}
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"the tokenizer of {folder} cannot be loaded ({_first_line(error)})") from error
    if ids != described:
        raise UserError(
            f"{folder}/tokenizer.json and the class {type(tokenizer).__name__}, which transformers chooses, read the "
            'same text as different tokens; set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json '
            "if tokenizer.json is right (of a model of the Hub in a copy, with model=local)"
        )
    return tokenizer


def _read_tokenizer_json(folder: Path) -> dict[str, list[int]]:
    """The ids of PROBE and of words behind every added token, by text, as tokenizer.json describes them.

    Empty if it does not know all of their characters.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{folder} holds no tokenizer.json; write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    _read_json(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{file} is damaged ({_first_line(error)}); copy it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    marks = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = (PROBE, "".join(f"{mark}Hi there " for mark in marks[:MOST_MARKS]))
    try:
        return {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}
    except Exception:  # a character that its model has no token for; the tokenizers library raises nothing narrower
        return {}


def _read_json(file: Path) -> dict:
    content = file.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull")
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({_first_line(error)}); copy it again") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
