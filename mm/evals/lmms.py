"""Our models in lmms-eval (EvolvingLMMs-Lab): `--model mm --model_args pretrained=runs/mine,prompt=chat`.

lmms-eval finds the class through the entry point `lmms_eval.models`, which gives it `manifest()`. Its other way in is
`llava_hf`, which runs a folder of `mm export --to hf-llava` without any code of ours; see docs/evaluation.md.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

from mm import hub
from mm.data.conversations import IMAGE
from mm.data.sample import Media
from mm.errors import ConfigError, DataError
from mm.evals.run import chunks
from mm.models.generate import generate, mean_losses
from mm.models.prompts import Decoding, Prompt, chat_prompt, raw_prompt
from mm.models.system import GenerativeSystem

Request = Any
"""An lmms-eval `Instance`: `args` are what its task hands to a model of its simple kind."""


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id="mm", simple_class_path="mm.evals.lmms.MM")


class MM(lmms):
    """A generative system of ours as lmms-eval asks it: text with pictures in, text or log-likelihoods out.

    pretrained: a run, a checkpoint, a released folder or a hub name. prompt: `chat` (the model's template) or `raw`
    (the task's text as it stands). system_prompt: the system turn of the chat form.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str = "auto",
        prompt: str = "chat",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        if prompt not in ("chat", "raw"):
            raise ConfigError(f"prompt={prompt}: expected chat or raw")
        system, self.layout, _ = hub.load(pretrained, device)
        if not isinstance(system, GenerativeSystem):
            raise ConfigError(f"{pretrained}: does not write text")
        self.system = system
        self.batch_size = int(batch_size)
        self.prompt, self.system_prompt = prompt, system_prompt

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """`args`: text, generation settings, doc_to_visual, doc_id, task, split."""
        answers: list[str] = []
        for some in _alike(requests, self.batch_size):
            prompts = [self._prompt(text, visual, *doc) for text, _, visual, *doc in (one.args for one in some)]
            answers += generate(self.system, self.layout, prompts, _decoding(some[0].args[1]))
        return answers

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """`args`: text, continuation (or a function of the document), doc_to_visual, doc_id, task, split.

        lmms-eval takes the least of these numbers, so they are losses, whatever their name: the mean over the
        continuation's tokens, in nats, as its own models give, and whether greedy decoding would write these tokens.
        """
        found: list[tuple[float, bool]] = []
        for some in chunks(requests, self.batch_size):
            prompts, targets = [], []
            for text, target, visual, id, task, split in (one.args for one in some):
                prompts.append(self._prompt(text, visual, id, task, split))
                targets.append(target if isinstance(target, str) else str(target(self.task_dict[task][split][id])))
            found += mean_losses(self.system, self.layout, prompts, targets)
        return found

    def generate_until_multi_round(self, requests: Sequence[Request]) -> list[str]:
        """Not supported: each round's question would depend on the answers before. Raises `ConfigError`."""
        raise ConfigError(
            "a task of several rounds, which `mm` does not answer; take one of output_type generate_until or "
            "multiple_choice"
        )

    def _prompt(self, text: str, visual: Any, id: Any, task: str, split: str) -> Prompt:
        pictures = [_picture(one) for one in visual(self.task_dict[task][split][id]) or ()]
        if text.count(IMAGE) != len(pictures):
            text = f"{IMAGE}\n" * len(pictures) + text.replace(IMAGE, "")
        if self.prompt == "raw":
            return raw_prompt(text, pictures, self.layout.template.after_media)
        return chat_prompt(text, pictures, self.system_prompt)


def _alike(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Batches in order, of requests with the same generation settings each."""
    start = 0
    for at in range(1, len(requests) + 1):
        if at == len(requests) or at - start == size or requests[at].args[1] != requests[start].args[1]:
            yield list(requests[start:at])
            start = at


def _decoding(given: dict[str, Any]) -> Decoding:
    """lmms-eval's names for ours: until, max_new_tokens, temperature, do_sample, top_p, num_beams."""
    until = given.get("until") or ()
    temperature = float(given.get("temperature") or 0.0) if given.get("do_sample", True) else 0.0
    return Decoding(
        max_new_tokens=int(given.get("max_new_tokens") or 1024),
        temperature=temperature,
        top_p=given.get("top_p") if temperature else None,
        beams=int(given.get("num_beams") or 1),
        stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
    )


def _picture(visual: Any) -> Media:
    """A Pillow picture as PNG, which loses nothing."""
    if not hasattr(visual, "save"):
        raise DataError(f"a {type(visual).__name__} among the pictures of a task; only pictures are supported")
    file = io.BytesIO()
    visual.convert("RGB").save(file, "PNG", compress_level=1)
    return Media("image", file.getvalue(), "png")
