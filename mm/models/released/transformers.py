"""A causal language model as a plain transformers folder, which `AutoModelForCausalLM` and `AutoTokenizer` load."""

import copy
from pathlib import Path
from typing import Any

from mm.data.layout import Layout

# Numbers, apostrophes, accents, blanks and other scripts: what tokenizers differ in.
SAMPLE = "In 1987 it DIDN'T rain, naïve e\u0301;\r\n\n\t  x = 3.25e+10  # 傘 🙂\n"
CHAMELEON = (
    "AutoModelForCausalLM reads it once mm.models.chameleon is imported; transformers' own Chameleon has a VQ model "
    "besides, which is not in this folder"
)


def write(language: Any, layout: Layout, out: Path) -> str | None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer into the folder `out`.

    The tokenizer puts the template's begin of text before a text, as in training, and no end of text behind it.

    Returns:
        What a user of the folder has to know, if anything: that AutoTokenizer does not take the tokenizer as written,
        or AutoModelForCausalLM not this type of model.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    template, tokenizer = layout.template, layout.tokenizer
    names = {"bos": template.bos, "eos": template.eos, "pad": tokenizer.token(layout.pad)}
    tokens = {name: token for name, token in names.items() if token is not None}
    config, generation = language.config, language.generation_config
    language.config, language.generation_config = copy.deepcopy((config, generation))
    try:
        for name, token in tokens.items():
            for about in (language.config, language.generation_config):
                setattr(about, f"{name}_token_id", tokenizer.id(token))
        language.save_pretrained(out)
    finally:
        language.config, language.generation_config = config, generation

    backend = Tokenizer.from_str(tokenizer.to_json())
    begin = []
    if template.bos is not None:
        begin = [tokenizer.id(template.bos)]
        backend.post_processor = TemplateProcessing([template.bos, "$A"], special_tokens=[(template.bos, *begin)])
    special = {f"{name}_token": token for name, token in tokens.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special).save_pretrained(
        out
    )
    notes = [CHAMELEON] if config.model_type == "chameleon" else []
    loaded = AutoTokenizer.from_pretrained(out)
    if loaded(SAMPLE)["input_ids"] != begin + tokenizer.encode(SAMPLE):
        notes.append(
            f"AutoTokenizer takes {type(loaded).__name__} for any {config.model_type} model, which splits text in "
            f"another way than {tokenizer.name}: load the tokenizer with transformers.PreTrainedTokenizerFast"
        )
    return "; ".join(notes) or None
