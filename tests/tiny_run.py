"""The config of a small real run that many tests share."""

from typing import Any

SOURCE = {"kind": "captions", "prompt": "{language}: "}
TINY: dict[str, Any] = {
    "data": {
        "sources": [{**SOURCE, "path": "builtin:emoji/validation-*.tar.gz"}],
        "validation": [{**SOURCE, "path": "builtin:emoji/validation-*.tar.gz"}],
        "test": [{**SOURCE, "path": "builtin:emoji/validation-*.tar.gz", "captions": "all"}],
        "context_length": 128,
        "budgets": {"image": 8},
        "visits": 2,
        "workers": 0,
    },
    "model": {
        "kind": "open_qwen2vl",
        "vision": {
            "name": "timm/vit_tiny_patch16_224",
            "pretrained": False,
            "image_size": 32,
            "crop": 0.6,
            "block": -1,
            "options": {
                "patch_size": 8,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "class_token": False,
                "global_pool": "",
            },
        },
        "connector": {"kind": "pool_mlp", "tokens": 4},
        "language": {
            "tokenizer": "builtin:emoji",
            "config": {
                "model_type": "qwen2",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
        },
    },
    "train": {
        "max_steps": 8,
        "batch_tokens": 512,
        "micro_batch": 2,
        "device": "cpu",
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "save_every": 4,
    },
    "evaluation": {"candidates": 4, "samples": 2},
}
