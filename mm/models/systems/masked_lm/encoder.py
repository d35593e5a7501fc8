"""Masked language models of transformers, by name or from a config, on packed rows.

Attention is bidirectional inside a document (`mm.models.attention`), and the head runs on the positions that are
predicted alone. A model is probed when it is built: two documents in one row have to give what transformers' own
attention gives of each.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError
from mm.models import attention, backbone
from mm.models.objectives import linear_cross_entropy_losses, next_token_losses
from mm.models.systems.masked_lm.config import EncoderConfig
from mm.models.vocabulary import check_tokenizer, make_room

Targets = Tensor | Callable[[Callable[[slice], Tensor]], Tensor]


def load(config: EncoderConfig, vocab_size: int, pad: int, weights: bool = True) -> Any:
    """The transformers model in float32, ready for packed rows.

    It knows `first_position`, the number of a document's first position (in RoBERTa the pad id + 1), and
    `ends_in_head`, whether logits are what its head's last layer gives.

    Args:
        vocab_size, pad: the tokenizer's; `pad` is the model's too, where it is made from a config.
        weights: read the published ones of `config.name`; else only its config is, and weights are random.

    Raises:
        ConfigError: the model cannot be had, does not take packed rows, or has too few embeddings.
    """
    if weights and config.name is not None and config.tokenizer not in (None, config.name):
        check_tokenizer(config.name, Tokenizer.load(config.tokenizer_name, config.added_tokens))
    options = {"dtype": "float32", "attn_implementation": attention.register()}
    auto = transformers.AutoModelForMaskedLM
    name = config.name or config.config["model_type"]  # type: ignore[index]
    try:
        if config.name is not None and weights:
            model = auto.from_pretrained(name, **options)
        elif config.name is not None:
            model = auto.from_config(transformers.AutoConfig.from_pretrained(name), **options)
        else:
            values = {"vocab_size": vocab_size, "pad_token_id": pad, **config.config}  # type: ignore[dict-item]
            model = auto.from_config(transformers.AutoConfig.for_model(values.pop("model_type"), **values), **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"model.language {name}: cannot be built: {_first_line(error)}") from None
    make_room(model, config, vocab_size, weights)
    behind_pad, model.ends_in_head = probe(model, name)
    own = model.config.pad_token_id
    if behind_pad and own != pad:
        raise ConfigError(
            f"model.template.pad has the id {pad}; {name} counts positions from that of its own, {own}: name that one"
        )
    model.first_position = own + 1 if behind_pad else 0
    model.base_model.register_forward_hook(_keep, with_kwargs=True)
    return model


def positions(model: Any) -> int:
    """Tokens of the longest document that a model takes."""
    return int(model.config.max_position_embeddings) - model.first_position


def run(
    model: Any, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor, keep: Tensor, isolate: bool = True
) -> Tensor:
    """Logits [K, V] at flat positions, int64 [K] (row * L + position), of packed rows [B, L]."""
    return model(**_inputs(model, input_ids, segment_ids, position_ids, keep, isolate)).logits[0]


def token_losses(
    model: Any, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor, keep: Tensor, targets: Targets,
    isolate: bool = True,
) -> Tensor:  # fmt: skip
    """-log p in nats, float32 [K], of targets, int64 [K], at flat positions; whole logits are not made, where the model
    ends in its head.

    Args:
        targets: or a function that is given the logits of a slice of the K positions when it asks, and gives targets.
    """
    head = model.get_output_embeddings()
    inputs = _inputs(model, input_ids, segment_ids, position_ids, keep, isolate)
    if not (model.ends_in_head and isinstance(head, nn.Linear)):  # adapters replace the layer
        logits = model(**inputs).logits[0]
        return next_token_losses(logits, targets if isinstance(targets, Tensor) else targets(lambda part: logits[part]))

    def losses(hidden: Tensor) -> Tensor:
        hidden, chosen = hidden[0], targets
        if not isinstance(chosen, Tensor):
            chosen = chosen(lambda part: F.linear(hidden[part], head.weight, head.bias))
        return linear_cross_entropy_losses(hidden, head.weight, head.bias, chosen)

    with backbone.calling(head, losses):
        return model(**inputs).logits


def _inputs(
    model: Any, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor, keep: Tensor, isolate: bool
) -> dict[str, Any]:
    """Packed rows as one row of transformers' arguments."""
    return {
        "input_ids": input_ids.reshape(1, -1),
        # Nothing is masked by it, and no model makes one of its own.
        "attention_mask": torch.ones(1, input_ids.numel(), dtype=torch.bool, device=input_ids.device),
        "position_ids": position_ids.reshape(1, -1) + model.first_position,
        "packing": attention.packing(segment_ids, isolate, causal=False),
        "keep": keep,
    }


def _keep(encoder: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """What the head is given: the positions that the call names."""
    output.last_hidden_state = output.last_hidden_state[:, kwargs["keep"]]
    return output


def probe(model: Any, name: str) -> tuple[bool, bool]:
    """Raise `ConfigError` unless two documents in one row give what each gives alone, in transformers' own attention.

    Returns:
        Whether positions count from the pad id on, and whether logits are what the head's last layer gives.

    Runs on a model with at most 4 layers and a small vocabulary, as `backbone.probe` does.
    """
    small = copy.deepcopy(model.config)
    small.num_hidden_layers = min(4, small.num_hidden_layers)
    small.vocab_size, small.pad_token_id = 64, 1
    if isinstance(getattr(small, "layer_types", None), list):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    ends = (0, 7), (7, 12)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            tiny: Any = type(model)(small).float().eval()
            ids, segments = torch.arange(4, 16)[None], torch.tensor([[1] * 7 + [2] * 5])
            where = segments, torch.tensor([[*range(7), *range(5)]]), torch.arange(12)
            packed = tiny.config._attn_implementation
            tiny.set_attn_implementation("sdpa")
            expected = torch.cat([tiny(input_ids=ids[:, a:b]).logits[0] for a, b in ends])
            tiny.set_attn_implementation(packed)
            tiny.base_model.register_forward_hook(_keep, with_kwargs=True)
            differences = []
            for tiny.first_position in (0, 2):
                logits = run(tiny, ids, *where)
                differences.append(float((logits - expected).abs().max() / expected.abs().max()))
                if differences[-1] < 1e-4:
                    break
            tiny.ends_in_head = True
            ends_in_head = _same_losses(tiny, ids, where)
    except Exception as error:
        raise ConfigError(
            f"model.language {name}: does not take packed rows ({_first_line(error)}); choose an encoder with standard "
            "attention, such as BERT or RoBERTa"
        ) from None
    if not differences[-1] < 1e-4:
        raise ConfigError(
            f"model.language {name}: documents in one row differ by {min(differences):.1e} (relative) from each alone: "
            "its positions or masks are not the standard ones; choose an encoder such as BERT or RoBERTa"
        )
    return len(differences) == 2, ends_in_head


def _same_losses(model: Any, ids: Tensor, where: tuple[Tensor, Tensor, Tensor]) -> bool:
    if not isinstance(head := model.get_output_embeddings(), nn.Linear):
        return False
    nn.init.normal_(head.weight, std=10)  # small logits would pass through a soft cap as if it were none
    targets = ids[0].flip(0)
    expected = next_token_losses(run(model, ids, *where), targets)
    return torch.allclose(token_losses(model, ids, *where, targets), expected, rtol=1e-4, atol=1e-4)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
