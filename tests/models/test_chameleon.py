"""Chameleon's language model: transformers' own numbers, for every token, packed or apart, and no VQ model with it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

from mm.data.batch import IGNORE, PackedBatch
from mm.data.tokenizer import chameleon_code
from mm.models import attention, backbone
from mm.models.chameleon import ChameleonForCausalLM
from mm.models.config import LanguageConfig

VOCABULARY = 60
CODES = {chameleon_code(n): 50 - 2 * n for n in range(16)}  # neither in order nor side by side
PICTURES = sorted(CODES.values())
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
VQ = {
    "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8,
    "num_embeddings": 16, "resolution": 16,
}  # fmt: skip
TOO_LARGE = {"num_embeddings": 10**13}  # to be built by nobody
STRUCTURES = [(False, 4), (True, 4), (False, 2), (True, 2)]


def transformers_model(swin: bool, key_heads: int) -> Any:
    """Their model with a VQ model, and no weight as it was initialised."""
    config = ChameleonConfig(
        **{**SMALL, "num_key_value_heads": key_heads},
        swin_norm=swin,
        vq_config=VQ,
        vocabulary_map={"<image>": 3, "<s>": 0, **CODES},
    )
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(theirs: Any) -> Any:
    """Our model with their weights."""
    model = ChameleonForCausalLM(theirs.config).eval()
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if ".vqmodel." not in name}
    model.load_state_dict(weights, strict=True)
    return model


def made(**values: Any) -> Any:
    torch.manual_seed(0)
    config = {"model_type": "chameleon", **SMALL, **values}
    return backbone.from_config(config, attention.register())


def some_ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("swin", "key_heads"), STRUCTURES)
def test_states_logits_and_gradients_are_transformers_own(swin: bool, key_heads: int) -> None:
    theirs = transformers_model(swin, key_heads)
    model = ours(theirs)
    ids = some_ids(2, 9)
    ids[0, 2:6] = torch.tensor(PICTURES[:4])
    found, expected = (m.base_model(ids, output_hidden_states=True) for m in (model, theirs))
    assert len(found.hidden_states) == 4
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    logits, right = model(ids).logits, theirs.lm_head(expected.last_hidden_state)
    torch.testing.assert_close(logits, right, rtol=0, atol=1e-6)

    targets = some_ids(2, 9).flatten()
    targets[::2] = PICTURES[5]  # of which transformers' whole model learns nothing
    for m, values in ((model, logits), (theirs, right)):
        m.zero_grad()
        F.cross_entropy(values.flatten(0, 1), targets).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if ".vqmodel." not in name}
    assert {name for name, _ in model.named_parameters()} == gradients.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7, msg=name)


def test_their_logits_are_ours_but_for_those_that_they_overwrite() -> None:
    theirs = transformers_model(swin=True, key_heads=4)
    ids = some_ids(2, 7)
    with torch.no_grad():
        found, overwritten = ours(theirs)(ids).logits, theirs(ids).logits
    text = torch.tensor([token for token in range(VOCABULARY) if token not in PICTURES])
    torch.testing.assert_close(found[..., text], overwritten[..., text], rtol=0, atol=1e-6)
    assert (overwritten[..., PICTURES] == torch.finfo(torch.float32).min).all()
    assert found[..., PICTURES].abs().max() < 100


def test_it_has_no_vq_model_even_where_the_config_describes_one() -> None:
    model = made(vq_config=TOO_LARGE)
    assert not [name for name, _ in model.named_modules() if "vq" in name]
    width, inner = SMALL["hidden_size"], SMALL["intermediate_size"]
    norms = 4 * width + 2 * width  # of queries and keys with a bias, each head's own; of the layer
    layer = 4 * width**2 + 3 * width * inner + norms
    assert sum(p.numel() for p in model.parameters()) == 2 * VOCABULARY * width + 3 * layer + width


def test_it_starts_from_the_configs_deviation_with_a_head_of_its_own() -> None:
    model = made(hidden_size=128, initializer_range=0.1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "norm" not in name:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.05), name
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.equal(*weights)


@pytest.mark.parametrize(("swin", "key_heads"), STRUCTURES)
def test_packed_segments_are_what_each_is_alone(swin: bool, key_heads: int) -> None:
    theirs = transformers_model(swin, key_heads)
    model = made(swin_norm=swin, num_key_value_heads=key_heads, vq_config=VQ).eval()
    model.load_state_dict(ours(theirs).state_dict())
    assert backbone.probe(model, "chameleon") == 1.0
    ids, spans = some_ids(2, 10), [(0, 0, 4), (0, 4, 10), (1, 0, 7)]
    segments, positions = torch.zeros(2, 10, dtype=torch.int32), torch.zeros(2, 10, dtype=torch.int64)
    for number, (row, a, b) in enumerate(spans, 1):
        segments[row, a:b], positions[row, a:b] = number, torch.arange(b - a)
    keep = (segments.flatten() > 0).nonzero()[:, 0]
    packed = backbone.run(model, model.get_input_embeddings()(ids), segments, positions, keep, isolate=True)
    alone = [theirs.lm_head(theirs.model(ids[row, None, a:b]).last_hidden_state)[0] for row, a, b in spans]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_losses_of_picture_tokens_without_whole_logits() -> None:
    model = made(swin_norm=True).eval()
    model.logit_factor = backbone.probe(model, "chameleon")
    ids = some_ids(2, 12)
    labels = torch.where(ids % 3 > 0, ids.roll(-1, 1), IGNORE)
    labels[:, 3:9] = torch.tensor(PICTURES[:6])
    segments, positions = torch.ones(2, 12, dtype=torch.int32), torch.arange(12).repeat(2, 1)
    batch = PackedBatch(ids, labels, segments, positions, torch.zeros_like(ids).byte(), {}, [])
    losses = backbone.token_losses(model, model.get_input_embeddings()(ids), batch)
    logits = model.lm_head(ours_unpacked(model, ids))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(losses, expected[labels.flatten() != IGNORE], rtol=1e-4, atol=1e-5)


def ours_unpacked(model: Any, ids: Tensor) -> Tensor:
    with backbone.ordinary_attention(model):
        states: Tensor = model.base_model(ids, use_cache=False).last_hidden_state
    return states


@pytest.mark.parametrize("swin", [False, True])
def test_transformers_generates_with_it(swin: bool) -> None:
    """With its cache: the likeliest token of a full forward pass, again and again, picture tokens among them."""
    model = ours(transformers_model(swin, key_heads=2))
    with torch.no_grad():
        model.lm_head.weight[PICTURES] *= 3  # likely to be chosen
        ids = some_ids(2, 5)
        written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids)
    assert set(written[:, 5:].flatten().tolist()) & set(PICTURES)


def test_a_system_takes_it_from_a_config() -> None:
    config = LanguageConfig.model_validate(
        {
            "config": {"model_type": "chameleon", **SMALL, "vocab_size": 5000, "vq_config": TOO_LARGE},
            "tokenizer": "builtin:emoji",
        }
    )
    model = backbone.load(config, 4096)
    assert isinstance(model, ChameleonForCausalLM) and model.logit_factor == 1.0
    assert type(model.base_model).__mro__[1].__name__ == "ChameleonModel"


def test_the_vocabularys_names_of_codes() -> None:
    """As transformers reads them."""
    names = {chameleon_code(code): 7 * code for code in range(8192)}
    assert len(names) == 8192 and chameleon_code(8190) == "IMGIMGIBJAZ"
    mapping = ChameleonImageVocabularyMapping(names)
    assert mapping.bpe2img == {7 * code: code for code in range(8192)}
