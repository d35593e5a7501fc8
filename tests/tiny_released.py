"""Tiny language models of the families that releases name, in folders that stand for their repositories."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
TOKENS = len(SPECIAL) + 256
ROWS = 272
"""Of the embeddings as published: more than the tokenizer has tokens, as OPT's."""
WIDTH, LAYERS = 32, 4
LANGUAGES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": WIDTH, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 96},
    "gpt_neox": {"hidden_size": WIDTH, "intermediate_size": 48, "max_position_embeddings": 96},
    "mistral": {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 4096,
        "max_position_embeddings": 8192,
    },
    "llama": {"hidden_size": WIDTH, "intermediate_size": 48, "max_position_embeddings": 96},
}  # fmt: skip
NAMES = {
    "opt": "facebook/opt-iml-max-1.3b",
    "gpt_neox": "togethercomputer/RedPajama-INCITE-Base-3B-v1",
    "mistral": "mistralai/Mistral-7B-v0.1",
}


def language(kind: str, rows: int, seed: int = 0) -> Any:
    """With weights so large that outputs depend on all of them."""
    torch.manual_seed(seed)
    values = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": rows, "pad_token_id": 1}
    config = transformers.AutoConfig.for_model(kind, **LANGUAGES[kind], **values, bos_token_id=0, eos_token_id=2)
    return spread(transformers.AutoModelForCausalLM.from_config(config))


def spread(model: Any) -> Any:
    """Noise on all weights, none of which then is as it was initialised."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_language(folder: Path, model: Any, weights: bool = False) -> Path:
    """What the repository of a language model holds: its config, with `ROWS` rows unless there are weights, and its
    tokenizer, whose tokens are bytes."""
    if weights:
        model.half().save_pretrained(folder)
        model.float()
    else:
        model.config.save_pretrained(folder)
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**about, "vocab_size": ROWS}))
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def run_of(folder: Path, cache: Path, model: dict[str, Any], params: list[dict[str, Any]]) -> Path:
    """The config of a run of three steps on pictures of emoji, which goes to `run/`."""
    source = {"kind": "captions", "name": "emoji", "path": "builtin:emoji/validation-*.tar.gz"}
    values = {
        "out": str(folder / "run"),
        "data": {
            "sources": [{**source, "only": {"language": "en"}}],
            "context_length": 96, "workers": 0, "cache": str(cache),
        },
        "model": model,
        "train": {
            "max_steps": 3, "batch_tokens": 384, "micro_batch": 2, "device": "cpu", "save_every": 3, "params": params,
            "optimizer": {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.0, "eps": 1e-6},
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(values))
    return path
