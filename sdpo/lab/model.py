"""The laboratory's model and its character tokenizer. Both are made in code; nothing is downloaded."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdpo.config import LabModel
from sdpo.lab.world import FILLER, LETTERS, MARKS

STOP = "<stop>"
VOCABULARY = {token: i for i, token in enumerate([STOP, FILLER, *MARKS, *LETTERS])}
CONTEXT = 32  # tokens; a prompt and its longest answer need 23
ROPE_THETA = 100.0  # the rules depend on positions, which fast rotations tell apart better in a short context


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and a stop token. No BOS token, because every prompt starts with its family's mark."""
    backend = Tokenizer(models.WordLevel(VOCABULARY))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=STOP, pad_token=STOP, model_max_length=CONTEXT)


def new_model(shape: LabModel, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama (fp32, eval mode) with the laboratory's vocabulary."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
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
