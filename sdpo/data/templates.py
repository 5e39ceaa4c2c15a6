"""Chat templates: pairs -> the text of the prompt and of each answer, and the token at which an answer stops."""

from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sdpo.data.preferences import Pair
from sdpo.data.schemas import Turns
from sdpo.errors import UserError

TEMPLATES = {
    "alpaca": (
        "{% if messages[0]['role'] != 'system' %}{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '\n\n### Response:\n' + message['content'] ~ eos_token }}"
        "{% else %}{{ message['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] ~ eos_token ~ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}


class Texts(NamedTuple):
    prompt: str  # with what invites the assistant to answer
    chosen: str  # without the stop token and what follows it
    rejected: str  # "" in a demonstration


def chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """The Jinja text of a named template, or of the tokenizer's own for None. Raises UserError."""
    names = ", ".join(TEMPLATES)
    if name is None and not tokenizer.chat_template:
        raise UserError(f"the tokenizer has no chat template; set data.template to one of {names}")
    if name is not None and name not in TEMPLATES:
        raise UserError(f"data.template={name} is none of {names}")
    return tokenizer.get_chat_template() if name is None else TEMPLATES[name]


class ChatFormat:
    """How one tokenizer and template write conversations. Raises UserError for a template that cannot be used.

    `bos` (id or None) begins a prompt if the text begins with it or `adds_bos` is set: a tokenizer's own template
    writes BOS itself where the model wants one, the named ones leave it to the tokenizer. `stop` ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None):
        self.tokenizer = tokenizer
        self.template = chat_template(tokenizer, template)
        self.bos = tokenizer.bos_token_id
        self.adds_bos = template is not None and tokenizer("").input_ids[:1] == [self.bos]
        self.stop, self.ending = self._find_ending()

    def texts(self, pair: Pair) -> Texts:
        """The pair written down. Raises UserError, naming the pair, where the template fails on it."""
        try:
            prompt = self.prompt(pair.prompt)
            answers = (self._answer(pair, prompt, answer) for answer in (pair.chosen, pair.rejected))
            return Texts(prompt, *answers)
        except (TemplateError, ValueError, UserError) as error:
            raise UserError(f"pair {pair.id} of source {pair.source}: the chat template fails ({error})") from error

    def prompt(self, turns: Turns) -> str:
        """A conversation in which the assistant is to speak next."""
        return self._render(turns, invite=True)

    def _answer(self, pair: Pair, prompt: str, answer: str) -> str:
        if not answer:
            return ""
        text = self._render((*pair.prompt, {"role": "assistant", "content": answer}))
        if not text.startswith(prompt) or not text.endswith(self.ending):
            raise UserError("the prompt alone is not how the conversation begins; set data.template")
        return text.removeprefix(prompt).removesuffix(self.ending)

    def _render(self, turns: Turns, invite: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(turns), chat_template=self.template, tokenize=False, add_generation_prompt=invite
        )

    def _find_ending(self) -> tuple[int, str]:
        """The stop token, and the text from there on: the first special token after an answer, else EOS."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        _, found, ending = self._render(turns).rpartition("answer")
        if not found:
            raise UserError("the chat template leaves the assistant's answers out; set data.template")
        special = {id: token.content for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.pop(self.tokenizer.unk_token_id, None)
        for id in self.tokenizer(ending, add_special_tokens=False).input_ids:
            if id in special:
                return id, ending[ending.index(special[id]) :]
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token and its template ends an answer with no special token")
        return self.tokenizer.eos_token_id, ending
