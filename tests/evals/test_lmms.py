"""The adapter on lmms-eval's own base class, requests and registry, where lmms-eval is installed."""

from pathlib import Path
from typing import Any

import pytest
from benchmark_samples import emoji

pytest.importorskip("lmms_eval.api.model")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from mm import hub
from mm.errors import ConfigError
from mm.evals.lmms import MM, _decoding, manifest
from mm.models.generate import generate, mean_losses
from mm.models.prompts import Decoding, chat_prompt, raw_prompt

DOCS = [{"question": f"What is picture {n}?", "image": emoji()[n].image} for n in range(3)]
TEXT = {"task": "t", "doc_id": 0, "repeats": 1}


def visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"]]


def requests(settings: list[dict[str, Any]]) -> list[Instance]:
    return [
        Instance("generate_until", (DOCS[n]["question"], one, visual, n, "t", "test"), n, metadata=TEXT)
        for n, one in enumerate(settings)
    ]


@pytest.fixture
def model(trained: Path) -> MM:
    found = ModelRegistryV2()
    found.register_manifest(manifest())
    made = found.get_model_class("mm").create_from_arg_string(f"pretrained={trained},prompt=raw", {"batch_size": 2})
    made.task_dict["t"] = {"test": DOCS}
    assert isinstance(made, MM) and made.batch_size == 2 and made.is_simple
    return made


def test_answers_are_those_of_our_own_generation(model: MM) -> None:
    settings = [{"max_new_tokens": 5}, {"max_new_tokens": 5}, {"max_new_tokens": 3, "until": ["a"]}]
    found = model.generate_until(requests(settings))
    for n, (answer, one) in enumerate(zip(found, settings, strict=True)):
        picture = emoji()[n].image
        prompt = raw_prompt(f"<image>\n{DOCS[n]['question']}", [model_picture(picture)])
        expected = generate(model.system, model.layout, [prompt], _decoding(one))
        assert [answer] == expected


def model_picture(picture: Any) -> Any:
    from mm.evals.lmms import _picture

    return _picture(picture)


def test_the_likeliest_target_has_the_least_number(model: MM) -> None:
    prompt = raw_prompt(f"<image>\n{DOCS[0]['question']}", [model_picture(emoji()[0].image)])
    (greedy,) = generate(model.system, model.layout, [prompt], Decoding(3))
    targets = [" yes", greedy, "yes, a longer one"]
    asked = [
        Instance("loglikelihood", (DOCS[0]["question"], one, visual, 0, "t", "test"), 0, metadata=TEXT)
        for one in targets
    ]
    found = model.loglikelihood(asked)
    expected = mean_losses(model.system, model.layout, [prompt] * 3, targets)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    assert [written for _, written in found] == [written for _, written in expected]
    assert min(found)[0] > 0


def test_chat_prompts_and_placeholders(trained: Path) -> None:
    with pytest.raises(ConfigError, match="expected chat or raw"):
        MM(str(trained), prompt="fancy")
    model = MM(str(trained))
    model.task_dict["t"] = {"test": DOCS}
    picture = model_picture(emoji()[1].image)
    assert model._prompt("a <image> b", visual, 1, "t", "test") == chat_prompt("a <image> b", [picture])
    assert model._prompt("a", visual, 1, "t", "test") == chat_prompt("<image>\na", [picture])
    assert hub.load(trained)[1].fingerprint() == model.layout.fingerprint()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Decoding(1024)),
        ({"until": "\n\n", "max_new_tokens": 16, "temperature": 0}, Decoding(16, stop=("\n\n",))),
        ({"until": ["a", ""], "num_beams": 3}, Decoding(1024, beams=3, stop=("a",))),
        ({"temperature": 0.7, "do_sample": True, "top_p": 0.9}, Decoding(1024, 0.7, 0.9)),
        ({"temperature": 0.7, "do_sample": False, "top_p": 1.0}, Decoding(1024)),
    ],
)
def test_generation_settings(given: dict[str, Any], expected: Decoding) -> None:
    assert _decoding(given) == expected
