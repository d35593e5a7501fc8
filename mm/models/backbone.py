"""Language backbones: any causal language model of transformers, by name or from a config, with packed attention.

A model is probed when it is built: two random segments, in one row and apart, must agree. A model with position or mask
logic of its own (ALiBi, recurrent layers, sinks) fails and is refused by name, rather than trained on leaking rows.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

import mm.models.chameleon  # noqa: F401  transformers has no causal language model of this type: ours is made known
from mm.data.batch import IGNORE, PackedBatch
from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError
from mm.models import attention
from mm.models.attention import Packing
from mm.models.config import LanguageConfig
from mm.models.meta_attention import MetaPlaces
from mm.models.objectives import (
    draw_labels,
    linear_cross_entropy_losses,
    linear_cross_entropy_terms,
    next_token_losses,
)
from mm.models.released.chameleon import consolidated
from mm.models.routing import Routing
from mm.models.vocabulary import check_tokenizer, make_room

if TYPE_CHECKING:
    from mm.models.gated import MediaSeen

T = TypeVar("T")


def load(config: LanguageConfig, vocab_size: int, weights: bool = True) -> Any:
    """The transformers model in float32, ready for packed rows.

    Args:
        vocab_size: the tokenizer's.
        weights: read the published ones of `config.name`; else only its config is, and weights are random.
    """
    implementation = attention.register()
    if config.name is not None:
        name = config.name
        if weights and config.tokenizer not in (None, name):
            check_tokenizer(name, Tokenizer.load(config.tokenizer_name, config.added_tokens))
        auto = transformers.AutoModelForCausalLM
        options = {"dtype": "float32", "attn_implementation": implementation}
        try:
            if (release := consolidated(name)) is not None:
                model = release.language(implementation, weights)
            elif weights:
                model = auto.from_pretrained(name, **options)
            else:
                model = auto.from_config(transformers.AutoConfig.from_pretrained(name), **options)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"model.language.name {name}: cannot be loaded: {_first_line(error)}") from None
    else:
        assert config.config is not None
        name = config.config["model_type"]
        model = from_config({"vocab_size": vocab_size, **config.config}, implementation)
        if config.init == "scaled":
            scale_residuals(model, name)
    make_room(model, config, vocab_size, weights)
    model.logit_factor = probe(model, name)
    return model


def from_config(values: dict[str, Any], implementation: str) -> Any:
    """A transformers causal LM with random weights from a plain dict with `model_type`."""
    values = dict(values)
    kind = values.pop("model_type")
    try:
        config = transformers.AutoConfig.for_model(kind, **values)
        config._attn_implementation = implementation
        return transformers.AutoModelForCausalLM.from_config(config, dtype="float32")
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.language.config: {_first_line(error)}") from None


WRITES = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "dense_4h_to_h", "fc_out")
"""What transformers' models call the last matrix of an attention or an MLP, the one that writes to the residual."""


@torch.no_grad()
def scale_residuals(model: Any, name: str) -> None:
    """Draw anew, with torch's generator, what writes to the residual; see `LanguageConfig.init`."""
    layers, std = model.config.num_hidden_layers, getattr(model.config, "initializer_range", None)
    found = [part for path, part in model.named_modules() if path.rpartition(".")[2] in WRITES]
    if std is None or len(found) != 2 * layers:
        raise ConfigError(
            f"model.language.init scaled: of a {name} model it is not known which matrices write to the residual; "
            "set it to default"
        )
    for part in found:
        nn.init.normal_(part.weight, std=std / math.sqrt(2 * layers))


def run(
    model: Any, embeddings: Tensor, segment_ids: Tensor, position_ids: Tensor, keep: Tensor, isolate: bool,
    implementation: str | None = None, routing: Routing | None = None, packing: Packing | None = None,
    media: "MediaSeen | None" = None, meta: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Logits at chosen positions of packed rows.

    Args:
        embeddings: [B, L, D]; segment_ids, position_ids: [B, L]; keep: int64 [K], flat positions (row * L + position).
        routing: of a model with experts or mixture of depths.
        packing: another than that of the segments, where there is a memory of positions before these.
        media: of a model with cross-attention: what the positions look at.
        meta: of a model with meta-attention: bool [B, L], which tokens are meta-tokens.

    Returns:
        [K, V]. The rows are flattened into one, so that the head runs on the K positions alone.
    """
    inputs = _inputs(embeddings, segment_ids, position_ids, isolate, implementation, routing, packing, media, meta)
    return model(**inputs, logits_to_keep=keep).logits[0]


def token_losses(
    model: Any, embeddings: Tensor, batch: PackedBatch, routing: Routing | None = None, z: float = 0.0,
    media: "MediaSeen | None" = None, meta: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """-log p in nats, float32 [K], of the batch's K targets, row by row; see `token_terms`."""
    return token_terms(model, embeddings, batch, routing, z, media, meta)[0]


def token_terms(
    model: Any, embeddings: Tensor, batch: PackedBatch, routing: Routing | None = None, z: float = 0.0,
    media: "MediaSeen | None" = None, meta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-log p in nats, float32 [K], of the batch's K targets, row by row: with what z adds, and without that and a
    gradient.

    Whole logits are not made, unless the model does more with its head's output than scale it.

    Args:
        routing, media, meta: see `run`.
        z: what is added to a loss is z * (log of the sum of all exp(logit))^2.
    """
    keep = batch.learned()
    targets = batch.labels.flatten()[keep]
    if not chunks_logits(model):
        where = batch.segment_ids, batch.position_ids
        logits = run(model, embeddings, *where, keep, batch.isolate_segments, routing=routing, media=media, meta=meta)
        losses = next_token_losses(logits, targets, z)
        return losses, next_token_losses(logits.detach(), targets) if z else losses.detach()
    return head_terms(model, hidden_at(model, embeddings, batch, keep, routing, media, meta), targets, z)


def chunks_logits(model: Any) -> bool:
    """Whether logits are the head's output times a number, so that they can be made some at a time."""
    # Adapters replace the layer.
    return model.logit_factor is not None and isinstance(model.get_output_embeddings(), nn.Linear)


def head_terms(model: Any, hidden: Tensor, targets: Tensor, z: float = 0.0) -> tuple[Tensor, Tensor]:
    """`token_terms` from what the head reads, [K, D], and targets int64 [K]."""
    head, factor = model.get_output_embeddings(), model.logit_factor

    def terms(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy_terms(hidden, head.weight, head.bias, targets, z)

    return at_head(head, hidden if factor == 1 else hidden * factor, terms)


def drawn_losses(
    model: Any, embeddings: Tensor, batch: PackedBatch, generators: Sequence[torch.Generator],
    routing: Routing | None = None, media: "MediaSeen | None" = None, meta: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`token_losses` of tokens that the model draws in place of the batch's targets, each row's from its generator."""
    keep, rows = batch.learned(), (batch.labels != IGNORE).sum(1).tolist()
    if not chunks_logits(model):
        where = batch.segment_ids, batch.position_ids
        logits = run(model, embeddings, *where, keep, batch.isolate_segments, routing=routing, media=media, meta=meta)
        return next_token_losses(logits, draw_labels(lambda part: logits[part], rows, generators))
    head, factor = model.get_output_embeddings(), model.logit_factor

    def losses(hidden: Tensor) -> Tensor:
        drawn = draw_labels(lambda part: F.linear(hidden[part], head.weight, head.bias), rows, generators)
        return linear_cross_entropy_losses(hidden, head.weight, head.bias, drawn)

    hidden = hidden_at(model, embeddings, batch, keep, routing, media, meta)
    return at_head(head, hidden if factor == 1 else hidden * factor, losses)


def at_head(head: nn.Module, hidden: Tensor, function: Callable[[Tensor], T]) -> T:
    """`function(hidden)`, which uses the head's weights."""
    with calling(head, function):
        return head(hidden)


@contextlib.contextmanager
def calling(head: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """A call of the head is one of the function, which uses the head's weights, for the time of the context.

    It is called as a module all the same: engines that keep weights in parts gather them in hooks around a module's
    call, and outside of it there may be nothing in `head.weight`.
    """
    before = vars(head).get("forward")
    vars(head)["forward"] = function
    try:
        yield
    finally:
        if before is None:
            del vars(head)["forward"]
        else:
            vars(head)["forward"] = before


def hidden_at(
    model: Any, embeddings: Tensor, batch: PackedBatch, keep: Tensor, routing: Routing | None = None,
    media: "MediaSeen | None" = None, meta: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[K, D]: what the head reads at flat positions, int64 [K]; see `run`."""
    where = batch.segment_ids, batch.position_ids, batch.isolate_segments
    return _hidden(model, _inputs(embeddings, *where, routing=routing, media=media, meta=meta))[keep]


def _inputs(
    embeddings: Tensor, segment_ids: Tensor, position_ids: Tensor, isolate: bool, implementation: str | None = None,
    routing: Routing | None = None, packing: Packing | None = None, media: "MediaSeen | None" = None,
    meta: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Packed rows as one row of transformers' arguments."""
    packing = packing or attention.packing(segment_ids, isolate, implementation)
    return {
        "inputs_embeds": embeddings.flatten(0, 1)[None],
        # Nothing is masked by it. Without one transformers looks for packed rows in the positions, and the host waits.
        "attention_mask": torch.ones(1, position_ids.numel(), dtype=torch.bool, device=embeddings.device),
        "position_ids": position_ids.reshape(1, -1),
        "use_cache": False,
        "packing": packing,
        **({} if routing is None else {"routing": routing}),
        **({} if media is None else {"media": media}),
        **({} if meta is None else {"meta": MetaPlaces.of(meta, packing)}),
    }


def _hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[N, D]: what the head reads, of every position."""
    return model.base_model(**inputs).last_hidden_state[0]


def miniature(model: Any, layers: int) -> Any:
    """A random model of the same kind in float32 with at most so many layers and 64 tokens, on the CPU."""
    small = copy.deepcopy(model.config)
    for key, value in (
        ("num_hidden_layers", min(layers, getattr(small, "num_hidden_layers", layers))),
        ("vocab_size", 64),
    ):
        setattr(small, key, value)
    if isinstance(getattr(small, "layer_types", None), list):
        with contextlib.suppress(AttributeError):  # some configs derive it
            small.layer_types = small.layer_types[: small.num_hidden_layers]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, key, None)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return type(model)(small).float().eval()


def probe(model: Any, name: str) -> float | None:
    """Raise `ConfigError` unless two segments in one row give what each gives alone.

    Returns:
        The number that the model multiplies its head's output by to get logits, 1 for most; None where that is not all.

    Runs on a copy of the model's config with at most 4 layers and a small vocabulary, so that it costs little
    for a model of any size, and on the meta device too.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            tiny = miniature(model, layers=4)
            width = tiny.get_input_embeddings().embedding_dim
            both = torch.randn(1, 12, width)
            ids = torch.tensor([[1] * 7 + [2] * 5])
            positions = torch.tensor([[*range(7), *range(5)]])
            packed = run(tiny, both, ids, positions, torch.arange(12), isolate=True)
            apart = [
                run(tiny, both[:, a:b], ids[:, a:b], positions[:, a:b], torch.arange(b - a), isolate=True)
                for a, b in ((0, 7), (7, 12))
            ]
            difference = float((packed - torch.cat(apart)).abs().max() / packed.abs().max())
            factor = _logit_factor(tiny, _inputs(both, ids, positions, isolate=True))
    except Exception as error:
        raise ConfigError(
            f"model.language {name}: does not take packed rows ({_first_line(error)}); choose a causal language model "
            "with standard attention"
        ) from None
    if not difference < 1e-4:
        raise ConfigError(
            f"model.language {name}: packed and separate runs of the same segments differ by {difference:.1e} "
            "(relative): it has position or mask logic of its own and would leak between samples; choose a model with "
            "standard attention"
        )
    return factor


def _logit_factor(model: Any, inputs: dict[str, Any]) -> float | None:
    """See `probe`. Changes the head's weights."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return None
    # Small logits would pass through a soft cap, c tanh(x / c), as if it were none.
    nn.init.normal_(head.weight, std=10)
    logits, plain = model(**inputs).logits[0], head(_hidden(model, inputs))
    factor = float((logits * plain).sum() / plain.square().sum())
    if not torch.allclose(logits, factor * plain, rtol=1e-4, atol=1e-4 * float(logits.abs().max())):
        return None
    if abs(factor - 1) < 1e-5:
        return 1.0
    return factor if head.bias is None else None


@contextlib.contextmanager
def ordinary_attention(model: Any) -> Iterator[None]:
    """transformers' own SDPA attention for the time of the context: generation with a cache needs it."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
