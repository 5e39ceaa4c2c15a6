"""The laboratory's model and its tokenizer of characters, both made in code: nothing is downloaded."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdpo.config import LabModel
from sdpo.lab.world import FILLER, LETTERS, MARKS

STOP = "<stop>"
VOCABULARY = {token: i for i, token in enumerate([STOP, FILLER, *MARKS, *LETTERS])}
CONTEXT = 32  # tokens; a prompt and its longest answer need 23
ROPE_THETA = 100.0  # rules are about places, which a short context tells apart better with fast rotations


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character and a stop token; no token for a beginning, because every prompt starts with its mark."""
    backend = Tokenizer(models.WordLevel(VOCABULARY))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=STOP, pad_token=STOP, model_max_length=CONTEXT)


def new_model(settings: LabModel, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama (fp32, eval mode) that speaks the laboratory's characters."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=None,
        eos_token_id=VOCABULARY[STOP],
        pad_token_id=VOCABULARY[STOP],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
