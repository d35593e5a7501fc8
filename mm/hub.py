"""`mm.load`: a run, one of its checkpoints, or a published model; `export`: out again in a published format."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mm.config import load_config
from mm.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from mm.data.config import DataConfig
    from mm.data.layout import Layout
    from mm.data.metadata import MetadataConfig
    from mm.models.prompts import Form
    from mm.models.system import System


@dataclass(frozen=True, slots=True)
class ReleaseConfig:
    """What is known of a published model, in the place of a run's config."""

    model: Any
    """The config of its kind of system: an `OpenQwen2VLConfig`, a `MertConfig`."""
    form: "Form | None"
    """How it is asked unless somebody says; None of a model that writes no text."""


def load(
    path: Path | str, device: str = "auto", template: str | None = None, tokens: int | None = None
) -> "tuple[System, Layout, Any]":
    """A model in evaluation mode, with what is needed to write for it.

        mm.load("runs/mine")                       a run (its newest checkpoint), or one checkpoint
        mm.load("weizhiwang/Open-Qwen2VL")         a release of Open-Qwen2VL, by its name on the hub or its folder
        mm.load("m-a-p/MERT-v1-95M")               a release of MERT: an encoder; heads and teacher are not released
        mm.load("Awiny/cosmo2.1b")                 a release of COSMO, or a folder or file of its weights
        mm.load("runs/checkpoint_best.pth")        a checkpoint of SimVLG as LAVIS writes it, or a folder that holds one
        mm.load("facebook/chameleon-7b")           a release of Chameleon, or a folder as Meta's own code reads it: the
                                                   language model alone
        mm.load("exported")                        a LLaVA folder with a SigLIP tower, or a HuBERT folder, such as
                                                   `mm export` writes

    Of a run, averaged weights are taken where it keeps them; adapters are merged.

    Args:
        template: another chat template than the model's: `chatml`, `release`, `fixed` or `plain`. Of a release the
            default is what its folder says (those that `mm export` wrote), else `release`, or `chatml` for one that
            was pre-trained only.
        tokens: another number of positions that a picture takes; a pooling connector's weights do not depend on it.

    Returns:
        The system, its layout (tokenizer, template, transforms), and the run's config (of a run in stages, that of the
        checkpoint's stage), or a `ReleaseConfig`; either has `.model`.

    Raises:
        CheckpointError: there is none, or its tensors are not those of the model that the config beside it describes.
    """
    from mm.models import released
    from mm.models.config import SYSTEMS
    from mm.train import checkpoint
    from mm.train.distributed import resolve_device
    from mm.train.stages import trained_system

    config: Any
    if (release := released.find(path)) is not None:
        kind: Any = SYSTEMS.resolve(release.kind)
        values = {"released": str(path)} if "released" in kind.model_fields else release.section()
        try:
            model = kind.model_validate(values)
        except ValidationError as error:
            raise CheckpointError(f"{path}: {_first(error)}") from None
        config = ReleaseConfig(_changed(model, template, tokens), release.form)
        system = config.model.build()
    else:
        folder = checkpoint.find(Path(path))
        stage = checkpoint.read_state(folder)["progress"]["stage"]
        config = load_config(folder.parent.parent / "config.yaml").stage_runs()[stage]
        config = config.model_copy(update={"model": _changed(config.model, template, tokens)})
        system = trained_system(config, folder)
    return system.to(resolve_device(device)).eval(), config.model.layout(), config


def trained_on(path: Path | str) -> "Iterator[tuple[DataConfig, list[dict[str, Any]]]]":
    """Of every stage of a run its data, and its sources as they were set: those of its packed set, if that is still
    there. Of a released model nothing."""
    from mm.data.packed import PackedDataset
    from mm.models import released
    from mm.train import checkpoint

    if released.find(path) is not None:
        return
    for run in load_config(checkpoint.find(Path(path)).parent.parent / "config.yaml").stage_runs():
        sources: list[dict[str, Any]] = [source.model_dump() for source in run.data.sources]
        if run.data.packed is not None:
            with suppress(DataError):
                sources = PackedDataset(run.data.packed / "train").about["provenance"]["sources"]
        yield run.data, sources


def metadata_of(path: Path | str) -> "MetadataConfig":
    """How a run says of its documents where they are from, in any of its stages: that of its sources, or of those of
    its packed set, if that is still there. `metadata_of(path).asked("https://en.wikipedia.org")` goes in front of a
    prompt. Of sources with a `fixed` value, any value is taken as it stands.

    Raises:
        ConfigError: its documents have no metadata, or some have others than the rest.
        CheckpointError: there is no run.
    """
    from mm.data.metadata import MetadataConfig
    from mm.data.shards import in_root
    from mm.models import released

    if released.find(path) is not None:
        raise ConfigError(f"{path}: a released model; nothing says whether its documents had metadata")
    given: list[MetadataConfig] = []
    for data, sources in trained_on(path):
        for values in filter(None, (source.get("metadata") for source in sources)):
            one = MetadataConfig.model_validate(values)
            given.append(one.model_copy(update={"known": in_root(one.known, str(data.root))}))
    found = {(one.prefix, one.suffix, one.take, one.known): one for one in given if one.fixed is None}
    around = {key[:2] for key in found}
    for one in given:
        if one.fixed is not None and (one.prefix, one.suffix) not in around:
            found[one.prefix, one.suffix, "value", ""] = one.model_copy(update={"fixed": None, "take": "value"})
    if not found:
        raise ConfigError(f"{path}: no document that it was trained on has metadata")
    if len(found) > 1:
        several = "; ".join(f"{one.prefix!r} {one.take} {one.known} {one.suffix!r}" for one in found.values())
        raise ConfigError(f"{path}: its training documents have metadata of {len(found)} kinds: {several}")
    return next(iter(found.values()))


def _changed(model: Any, template: str | None, tokens: int | None) -> Any:
    """A model's section with another template or number of tokens. Raises `ConfigError`."""
    values = model.model_dump()
    if template is not None:
        if "template" not in values:
            raise ConfigError(f"template: a {model.kind} model writes no text")
        values["template"]["chat"] = template
    if tokens is not None:
        if "connector" not in values:
            raise ConfigError(f"tokens: a {model.kind} model takes no pictures")
        values["connector"] |= {"tokens": tokens, "pool": None}
    try:
        return type(model).model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first(error)) from None


def _first(error: ValidationError) -> str:
    """Of what is wrong, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"


def export(
    path: Path | str, out: Path, to: str | None = None, template: str | None = None, tokens: int | None = None
) -> str | None:
    """Write the model of a run, checkpoint or release into the folder `out`, which appears whole or not at all.

    Args:
        to: `transformers`, a plain folder of a text_lm or masked_lm; `prismatic`, as Open-Qwen2VL was released;
            `hf-llava`, for stock transformers; `hf`, the encoder of a mert or tagger model, for stock transformers;
            `janus-vq`, a vq model as its `JanusVQVAE`, which `model.teacher` takes too; `open_clip`, a clip model;
            `cosmo`, `lavis`, a cosmo or simvlg model as their authors' code saves it. Needed where a model fits
            several.
        template, tokens: as in `load`.

    Returns:
        What a user of the folder has to know, if anything.

    Raises:
        ConfigError: the model does not fit the format, or `out` is there.
        CheckpointError: there is none.
    """
    from mm.models.answers import form_of
    from mm.models.released import FORMATS, cosmo, janus_vq, lavis, llava, mert, open_clip, prismatic, transformers

    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another --out or remove it")
    system: Any
    system, layout, config = load(path, "cpu", template, tokens)
    model: Any = config.model
    fitting = [name for name, kinds in FORMATS.items() if model.kind in kinds]
    to = to or (fitting[0] if len(fitting) == 1 else None)
    if to not in fitting:
        choices = f"it can be written as {' or '.join(fitting)}, with --to" if fitting else "no format takes it"
        wanted = f" is not for --to {to}" if to else ""
        raise ConfigError(f"{path}: a model of the kind {model.kind}{wanted}: {choices}")
    if getattr(system, "sparsity", None) is not None:
        raise ConfigError(f"{path}: a model with experts or mixture of depths; no format has a place for them")
    if getattr(system, "meta_attention", False):
        raise ConfigError(f"{path}: a model with meta-attention; transformers has no class for it. mm.load reads it")
    if getattr(system, "zero_positions", False):
        raise ConfigError(
            f"{path}: meta-tokens stand at position 0; transformers has no class for it. mm.load reads it"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    note = None
    try:
        if to == "transformers":
            mask = getattr(model, "mask_token", None)
            note = transformers.write(system.language, layout, partial, mask, form_of(config))
        elif to == "prismatic":
            prismatic.write(system, layout, model, partial, out.name, form_of(config))
        elif to == "janus-vq":
            note = janus_vq.write(system, partial)
        elif to == "open_clip":
            note = open_clip.write(system, model, partial)
        elif to == "cosmo":
            note = cosmo.write(system, model, partial)
        elif to == "lavis":
            _freeze_as_trained(system, config)
            note = lavis.write(system, model, partial)
        elif to == "hf-llava":
            note = llava.write(system, layout, model, partial, form_of(config))
        else:
            note = mert.write(system, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return note


def _freeze_as_trained(system: Any, config: Any) -> None:
    """Let `requires_grad` say what is trained: of a run, what it does not freeze; of a release, all but the tower."""
    from mm.train.config import ParamRule
    from mm.train.params import freeze

    tower = [ParamRule(match=r"vision\.featurizer\..*", freeze=True)]
    freeze(system, tower if isinstance(config, ReleaseConfig) else config.train.params)
