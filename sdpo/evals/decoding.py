"""How answers are generated, and how benchmarks have theirs generated.

AlpacaEval 2 leaves decoding to whoever submits a model; its preset is what most of its own configurations of local
models say.
"""

from typing import Any, NamedTuple

from sdpo.data.prompts import Prompt
from sdpo.errors import UserError

Temperature = float | dict[str, float]  # 0: greedy; a dictionary gives it by category (Prompt.dataset)


class Preset(NamedTuple):
    temperature: Temperature
    top_p: float
    max_new_tokens: int
    source: str


PLAIN = Preset(0.0, 1.0, 512, "")
MT_BENCH = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
MT_BENCH |= {"stem": 0.1, "humanities": 0.1}
PRESETS = {
    "alpaca_eval": Preset(0.7, 1.0, 2048, "alpaca_eval 0.6.6: models_configs/zephyr-7b-beta/configs.yaml"),
    "arena_hard": Preset(0.0, 1.0, 4096, "arena-hard-auto: config/gen_answer_config.yaml"),
    "mt_bench": Preset(MT_BENCH, 1.0, 1024, "FastChat: llm_judge/common.py, and the defaults of gen_model_answer.py"),
    "wild_bench": Preset(0.0, 1.0, 4096, "WildBench: scripts/_common_vllm.sh"),
}


class Decoding(NamedTuple):
    """How answers are generated. `batch_size` is part of it because padding changes the last digits."""

    temperature: Temperature
    max_new_tokens: int
    batch_size: int
    seed: int
    top_p: float = 1.0  # tokens are drawn from the most probable ones that together have at least this probability

    def for_prompt(self, prompt: Prompt) -> "Decoding":
        """With the temperature of a prompt's category. Raises UserError if the category has none."""
        if not isinstance(self.temperature, dict):
            return self
        if prompt.dataset not in self.temperature:
            raise UserError(
                f"prompt {prompt.id} is of the category {prompt.dataset!r}, which has no temperature: its row needs a "
                f"`category` that is one of {', '.join(self.temperature)}"
            )
        return self._replace(temperature=self.temperature[prompt.dataset])

    def determinants(self) -> dict[str, Any]:
        """What it adds to a key: `top_p` only if it cuts something off."""
        return {name: value for name, value in self._asdict().items() if (name, value) != ("top_p", 1.0)}


def choose(
    preset: str | None,
    temperature: float | None,
    top_p: float | None,
    max_new_tokens: int | None,
    batch_size: int,
    seed: int,
) -> Decoding:
    """The settings of a preset (None: PLAIN), replaced by those that are not None.

    Raises UserError for an unknown preset, and for `top_p` outside of 0 to 1.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"there is no preset {preset}; there are {', '.join(PRESETS)}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is no probability: set it above 0 and not above 1")
    chosen = PLAIN if preset is None else PRESETS[preset]
    return Decoding(
        temperature=chosen.temperature if temperature is None else temperature,
        top_p=chosen.top_p if top_p is None else top_p,
        max_new_tokens=chosen.max_new_tokens if max_new_tokens is None else max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
