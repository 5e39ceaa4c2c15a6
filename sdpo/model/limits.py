"""What a model can read: its vocabulary and its positions. What goes beyond them is refused before any work."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from transformers import AutoConfig, PretrainedConfig

from sdpo.errors import UserError
from sdpo.model import rotary
from sdpo.types import TokenPair

NO_NAMES: Mapping[str, str] = MappingProxyType({})


def check_rows(
    rows: Iterable[TokenPair], folder: Path, trust_remote_code: bool = False, called: Mapping[str, str] = NO_NAMES
) -> None:
    """Raise UserError if a row has a token or a position that the model of a folder lacks.

    The sentence names the row as `called` does, by its id.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    longest = rotary.longest_readable(config)
    for row in rows:
        name = called.get(row.id, f"row {row.id}")
        largest = max(int(ids.max(initial=0)) for ids in row.ids)
        if largest >= config.vocab_size:
            raise UserError(
                f"{name} has token {largest}, but the model in {folder} knows {config.vocab_size} tokens, from 0 "
                "on; its tokenizer belongs to another model, or has tokens that were never added to the embedding"
            )
        if row.longest > longest:
            raise UserError(
                f"{name} has {row.longest} tokens, but the model in {folder} reads at most {longest:.0f}; set "
                f"data.max_tokens={longest:.0f}"
            )


def check_answers(
    prompts: Iterable[list[int]], max_new_tokens: int, config: PretrainedConfig, setting: str, shorten: str
) -> None:
    """Raise UserError if a prompt and its answer may be longer than a model reads.

    The sentence says which setting to lower, `max_new_tokens` under its name in the settings, and what else to shorten.
    """
    longest, readable = max(map(len, prompts)) + max_new_tokens, rotary.longest_readable(config.get_text_config())
    if longest > readable:
        raise UserError(
            f"the model reads {readable:.0f} tokens, but the longest prompt and its answer may have {longest}; "
            f"lower {setting}={max_new_tokens} or shorten {shorten}"
        )
