"""The TomeFormer: transformers' own BERT where it merges nothing, and against the release's algorithm by loops."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from pydantic import ValidationError
from tiny_simvlg import BERT, VISION
from torch import Tensor, nn

from mm.errors import CheckpointError, ConfigError
from mm.models.config import VisionConfig
from mm.models.merging import counts
from mm.models.tomeformer import TomeFormer
from mm.models.tomeformer_config import TomeFormerConfig
from mm.train.blocks import checkpoint_activations, find_blocks
from mm.train.config import CheckpointingConfig, TrainConfig

WIDTH, OUT = 24, 20


def build(bert: dict[str, Any] | None = None, **changes: Any) -> TomeFormer:
    torch.manual_seed(0)
    config = TomeFormerConfig.model_validate({"config": {**BERT, **(bert or {})}, "r": 3, **changes})
    return config.build(WIDTH, OUT).eval()


def features(n: int = 3, t: int = 17) -> Tensor:
    return torch.randn(n, t, WIDTH, generator=torch.Generator().manual_seed(1)) * 3


def as_bert(connector: TomeFormer) -> Any:
    """transformers' model with the same weights."""
    theirs: Any = transformers.BertModel(connector.bert.config.__class__.from_dict(BERT)).eval()
    missing = theirs.load_state_dict(connector.bert.state_dict(), strict=False)
    assert missing.missing_keys == ["embeddings.word_embeddings.weight"] and missing.unexpected_keys == []
    return theirs


def test_merging_nothing_it_is_transformers_bert() -> None:
    connector = build(r=0)
    theirs = as_bert(connector)
    x, weight = features().requires_grad_(), torch.randn(3, 17, OUT)
    found = connector(x)
    (found * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in connector.named_parameters() if p.grad is not None}
    (grad,) = (x.grad.clone(),) if x.grad is not None else ()
    connector.zero_grad()
    x.grad = None
    hidden = theirs(inputs_embeds=connector.input(connector.norm(x))).last_hidden_state
    expected = connector.output(hidden)
    (expected * weight).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, x.grad, rtol=1e-5, atol=1e-6)
    own = {name: p.grad for name, p in connector.named_parameters() if p.grad is not None}
    right = {**own, **{f"bert.{name}": p.grad for name, p in theirs.named_parameters() if p.grad is not None}}
    assert grads.keys() == right.keys() == dict(connector.named_parameters()).keys()
    for name, one in right.items():
        assert float((grads[name] - one).norm()) <= 1e-6 * max(1.0, float(one.norm())), name


def test_257_features_become_29_positions() -> None:
    vision = VisionConfig.model_validate({**VISION, "image_size": 224, "options": {"patch_size": 14}})
    bert = {"num_hidden_layers": 12, "max_position_embeddings": 257}
    config = TomeFormerConfig(config={**BERT, **bert})
    assert vision.features == 257 and config.positions(vision) == 29
    connector, left = build(bert, r=19), []
    for layer in connector.bert.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: left.append(output[0].shape[1]))
    with torch.no_grad():
        assert connector(features(1, 257)).shape == (1, 29, OUT)
    assert left == [238, 219, 200, 181, 162, 143, 124, 105, 86, 67, 48, 29]
    for r in (0, 7, 19, 40, 200):
        rs = [r] * 12
        assert config.model_copy(update={"r": r}).positions(vision) == 1 + counts(256, rs)[-1]


def merged_by_loops(hidden: Tensor, keys: Tensor, r: int) -> Tensor:
    """The release's matching and plain mean on one picture, [T, D] and [T, C]: even places look for an odd one."""
    likeness: list[tuple[float, int, int]] = []
    for even in range(2, len(hidden), 2):
        found = [(float(F.cosine_similarity(keys[even], keys[odd], dim=0)), odd) for odd in range(1, len(hidden), 2)]
        best, odd = max(found)
        likeness.append((best, even, odd))
    gone = {even: odd for _, even, odd in sorted(likeness, reverse=True)[:r]}
    kept = [hidden[even] for even in range(0, len(hidden), 2) if even not in gone]
    for odd in range(1, len(hidden), 2):
        kept.append(torch.stack([hidden[odd], *(hidden[even] for even, to in gone.items() if to == odd)]).mean(0))
    return torch.stack(kept)


def test_layers_merge_as_the_release_does() -> None:
    """Behind the attention's residual and norm, before the MLP, by the mean of the keys over heads; plain means."""
    connector = build()
    with torch.no_grad():
        hidden = connector.bert.embeddings(inputs_embeds=connector.input(connector.norm(features())))
        theirs, found = as_bert(connector), hidden
        for layer, other in zip(connector.bert.encoder.layer, theirs.encoder.layer, strict=True):
            found, size = layer(found, None)
            assert size is None
            keys = other.attention.self.key(hidden).unflatten(2, (4, -1)).mean(2)
            attended = other.attention(hidden)[0]
            hidden = torch.stack([merged_by_loops(a, k, 3) for a, k in zip(attended, keys, strict=True)])
            hidden = other.output(other.intermediate(hidden), hidden)
            torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(connector(features()), connector.output(hidden), rtol=1e-5, atol=1e-5)


def test_sizes_are_kept_where_means_are_weighted() -> None:
    plain, weighted = build(), build(weighted=True)
    counted = build(weighted=True, proportional=True)
    x = features()
    with torch.no_grad():
        hidden = weighted.bert.embeddings(inputs_embeds=weighted.input(weighted.norm(x)))
        size = torch.ones(3, 17)
        first, second = weighted.bert.encoder.layer
        one, size = first(hidden, size)
        assert torch.equal(size.sum(1), torch.full((3,), 17.0)) and bool((size[:, 0] == 1).all())
        torch.testing.assert_close(one, plain.bert.encoder.layer[0](hidden, None)[0])
        _, later = second(one, size)
        assert torch.equal(later.sum(1), torch.full((3,), 17.0))
        outputs = [connector(x) for connector in (plain, weighted, counted)]
    for a, b in ((0, 1), (1, 2)):
        assert float((outputs[a] - outputs[b]).abs().max()) > 1e-4


def test_attention_counts_a_merged_feature_as_often_as_it_was_made_from_others() -> None:
    connector = build(r=0, weighted=True, proportional=True)
    layer, size = connector.bert.encoder.layer[0], torch.tensor([[1.0, 3.0, 2.0]])
    x = torch.randn(1, 3, BERT["hidden_size"])
    repeated = x[:, [0, 1, 1, 1, 2, 2]]
    with torch.no_grad():
        found = layer(x, size)[0]
        expected = as_bert(connector).encoder.layer[0](repeated)
    torch.testing.assert_close(found, expected[:, [0, 1, 4]], rtol=1e-5, atol=1e-5)


def test_a_picture_does_not_depend_on_the_others() -> None:
    connector, x = build(), features()
    with torch.no_grad():
        together = connector(x)
        torch.testing.assert_close(together, torch.cat([connector(one) for one in x.split(1)]), rtol=1e-6, atol=1e-6)


def test_names_are_those_of_the_released_checkpoints() -> None:
    """And the pooler, which they hold and nobody uses, is no parameter."""
    connector = build()
    theirs = transformers.BertModel(transformers.BertConfig.from_dict(BERT)).state_dict()
    parts = {name for name in connector.state_dict() if not name.startswith("bert.")}
    assert parts == {f"{part}.{what}" for part in ("norm", "input", "output") for what in ("weight", "bias")}
    bert = {name.removeprefix("bert."): one.shape for name, one in connector.state_dict().items() if name not in parts}
    assert bert == {name: one.shape for name, one in theirs.items() if "word_embeddings" not in name}
    assert not any("pooler" in name for name, _ in connector.named_parameters())
    connector(features()).sum().backward()
    assert all(p.grad is not None for p in connector.parameters())


def test_it_begins_as_a_published_bert(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = transformers.BertModel(transformers.BertConfig.from_dict(BERT))
    theirs.save_pretrained(tmp_path)
    config = TomeFormerConfig(name=str(tmp_path), r=3)
    assert config.positions(VisionConfig.model_validate(VISION)) == 11
    torch.manual_seed(0)
    found, random = config.build(WIDTH, OUT), config.build(WIDTH, OUT, False)
    for name, tensor in theirs.state_dict().items():
        if "word_embeddings" not in name:
            assert torch.equal(found.bert.state_dict()[name], tensor), name
    same = [torch.equal(random.bert.state_dict()[name], theirs.state_dict()[name]) for name in random.bert.state_dict()
            if name.endswith("dense.weight")]  # fmt: skip
    assert same and not any(same)


def test_a_copy_has_weights_of_its_own() -> None:
    connector, x = build(), features()
    copied = copy.deepcopy(connector)
    with torch.no_grad():
        before = connector(x)
        for parameter in connector.parameters():
            parameter.zero_()
        assert torch.equal(copied(x), before) and not torch.equal(connector(x), before)


def test_layers_can_be_recomputed() -> None:
    system = nn.Module()
    system.connector = build({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}).train()
    other = copy.deepcopy(system)
    blocks = find_blocks(other, TrainConfig(max_steps=1).blocks)
    assert list(blocks) == [f"connector.bert.encoder.layer.{number}" for number in range(2)]
    checkpoint_activations(other, CheckpointingConfig(mode="full"), blocks)
    grads = []
    for one in (system, other):
        torch.manual_seed(5)
        one.connector(features()).square().sum().backward()  # type: ignore[operator]
        grads.append([p.grad for p in one.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_the_norm_runs_in_float32() -> None:
    connector, seen = build(), []
    connector.norm.register_forward_hook(lambda module, args, output: seen.extend([args[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        assert connector(features().bfloat16()).dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32]


# changes -> what the one line must say
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "give either `name` (published weights) or `config`"),
    ({"name": "a/b", "config": BERT}, "give either `name` (published weights) or `config`"),
    ({"config": BERT, "proportional": True}, "set `weighted: true` too"),
    ({"config": BERT, "r": -1}, "greater than or equal to 0"),
]


@pytest.mark.parametrize(("values", "line"), WRONG, ids=["none", "both", "proportional", "r"])
def test_wrong_settings_are_said(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as error:
        TomeFormerConfig.model_validate(values)
    assert line in str(error.value)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    vision = VisionConfig.model_validate({**VISION, "image_size": 64})
    with pytest.raises(ConfigError, match=r"its BERT has 32 places, model\.vision gives 65 features"):
        TomeFormerConfig(config=BERT).positions(vision)
    with pytest.raises(ConfigError, match=r"its BERT is of the type roberta"):
        TomeFormerConfig(config={**BERT, "model_type": "roberta"}).build(WIDTH, OUT)
    with pytest.raises(ConfigError, match=r"its BERT cannot be built: .*multiple of the number of attention"):
        TomeFormerConfig(config={**BERT, "hidden_size": 30}).build(WIDTH, OUT)
    with pytest.raises(CheckpointError, match=r"there is no config\.json in this folder"):
        TomeFormerConfig(name=str(tmp_path)).positions(vision)
