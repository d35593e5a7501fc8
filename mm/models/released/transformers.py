"""A language model as a plain transformers folder, which `AutoModelForCausalLM`, or `AutoModelForMaskedLM`, and
`AutoTokenizer` load."""

import copy
from pathlib import Path
from typing import Any

from mm.data.chat import END, SPELLINGS
from mm.data.layout import Layout
from mm.models.released.chat_templates import jinja

# Numbers, apostrophes, accents, blanks and other scripts: what tokenizers differ in.
SAMPLE = "In 1987 it DIDN'T rain, naïve e\u0301;\r\n\n\t  x = 3.25e+10  # 傘 🙂\n"
CHAMELEON = (
    "AutoModelForCausalLM reads it once mm.models.chameleon is imported; transformers' own Chameleon has a VQ model "
    "besides, which is not in this folder"
)


def write(language: Any, layout: Layout, out: Path, mask: str | None = None, form: str = "raw") -> str | None:
    """Write config.json, model.safetensors, the tokenizer, and generation_config.json into the folder `out`.

    The tokenizer puts the template's begin of text before a text, as in training, and no end of text behind it.

    Args:
        mask: the token of a masked language model. It generates nothing, and its tokenizer puts the end of text behind
            a text too.
        form: `chat`: the tokenizer has the template of conversations, and the end of a turn ends what is generated.

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
    config, generation = language.config, getattr(language, "generation_config", None)
    language.config, language.generation_config = copy.deepcopy((config, generation))
    try:
        for name, token in tokens.items():
            for about in filter(None, (language.config, language.generation_config)):
                setattr(about, f"{name}_token_id", tokenizer.id(token))
        if form == "chat" and language.generation_config is not None:
            ends = {*filter(None, [template.eos]), *({END} & set(SPELLINGS[template.chat].tokens))}
            language.generation_config.eos_token_id = sorted(map(tokenizer.id, ends))
        language.save_pretrained(out)
    finally:
        language.config, language.generation_config = config, generation

    backend = Tokenizer.from_str(tokenizer.to_json())
    before = [template.bos] if template.bos is not None else []
    behind = [template.eos] if mask is not None and template.eos is not None else []
    begin, end = ([*map(tokenizer.id, around)] for around in (before, behind))
    if before or behind:
        known = list(zip(before + behind, begin + end, strict=True))
        backend.post_processor = TemplateProcessing([*before, "$A", *behind], special_tokens=known)
    special: dict[str, str | None] = {f"{name}_token": token for name, token in tokens.items()}
    if mask is not None:
        special |= {"mask_token": mask, "cls_token": template.bos, "sep_token": template.eos}
    named = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    if form == "chat":
        named.chat_template = jinja(template)
    named.save_pretrained(out)
    notes = [CHAMELEON] if config.model_type == "chameleon" else []
    loaded = AutoTokenizer.from_pretrained(out)
    if loaded(SAMPLE)["input_ids"] != begin + tokenizer.encode(SAMPLE) + end:
        notes.append(
            f"AutoTokenizer takes {type(loaded).__name__} for any {config.model_type} model, which splits text in "
            f"another way than {tokenizer.name}: load the tokenizer with transformers.PreTrainedTokenizerFast"
        )
    return "; ".join(notes) or None
