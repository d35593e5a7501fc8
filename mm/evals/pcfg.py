"""What metadata do to a language model, beside what they would do to a reader who knows the grammar (`mm pcfg`).

A model trained on `mm data build pcfg` is asked three things on held-out documents, as in arXiv 2504.17562: its loss by
position, with metadata and without; what a linear probe reads off its hidden states about each latent; and whether what
it writes behind the first n terminals is grammatical. The grammar is known, so each number has the exact one beside it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from mm import hub
from mm.curves import Line, line_chart, three
from mm.data.corpora.grammar import NOTHING, OTHER, Grammar, losses, posterior, predicted, targets_of
from mm.data.corpora.pcfg import TERMINALS, metadata, read_split
from mm.data.layout import Layout
from mm.data.sample import keyed_rng, keyed_seed
from mm.data.tokenizer import Tokenizer
from mm.errors import ConfigError, DataError
from mm.evals.results import Progress, Result, prepared, write
from mm.models import backbone
from mm.models.system import GenerativeSystem, weights_digest
from mm.page import count, percent, render

if TYPE_CHECKING:
    from markupsafe import Markup

FEW = 50
"""Positions that fewer documents reach are left out: by chance alone they would say anything."""
BATCH = 256
PROMPTS = 14
"""Lengths of prompts, at most so many, evenly spaced."""
CHART, SMALL = (520, 230), (350, 190)
COLOURS, INK = (0, 1, 2, 3, 5, 6), 4
"""Of layers in a chart of probes, of which so many are drawn, evenly spaced; and of what is exact."""


@dataclass(frozen=True)
class Documents:
    """Terminals by number, int [B, N] with `NOTHING` behind, and latents, int [B, D]."""

    strings: np.ndarray
    latents: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        found: np.ndarray = (self.strings != NOTHING).sum(1)
        return found

    def __len__(self) -> int:
        return len(self.strings)

    def __getitem__(self, which: slice | np.ndarray) -> "Documents":
        return Documents(self.strings[which], self.latents[which])

    def parts(self) -> Iterator["Documents"]:
        """A few at a time."""
        for start in range(0, len(self), BATCH):
            yield self[start : start + BATCH]


class Reader:
    """A model that reads and writes documents of the corpus. `told`: so many latents stand in front, then masks.

    Raises:
        ConfigError: it does not write text, or its documents have no end.
        DataError: its tokenizer is not the corpus's.
    """

    def __init__(self, system: Any, layout: Layout, folder: Path, grammar: Grammar, name: str) -> None:
        if not isinstance(system, GenerativeSystem) or system.decodes_itself:
            raise ConfigError(f"{name}: expected a plain causal language model (kind text_lm), as trained on {folder}")
        if layout.tokenizer.fingerprint() != Tokenizer.load(str(folder)).fingerprint():
            raise DataError(f"{name}: its tokenizer is not that of {folder}; give the corpus that it was trained on")
        template, tokenizer = layout.template, layout.tokenizer
        if template.eos is None:
            raise ConfigError(f"{name}: model.template.eos is null, so documents have no end; expected <eos>")
        self._language = system.language
        self._device = next(system.parameters()).device
        self._tokenizer = tokenizer
        self._longest = grammar.longest
        self._opening = [] if template.bos is None else [tokenizer.id(template.bos)]
        self._end = tokenizer.id(template.eos)
        self._ids = np.array([*(tokenizer.id(word) for word in TERMINALS[: grammar.symbols]), self._end])

    def _rows(self, documents: Documents, told: int) -> tuple[Tensor, int]:
        """int64 [B, P + N] of what opens the row and the terminals, with anything behind; and P."""
        opening = [
            [*self._opening, *self._tokenizer.encode(metadata(latents, told))] for latents in documents.latents.tolist()
        ]
        # A causal model does not see what stands behind, so padding may be any token.
        rows = np.concatenate([np.array(opening), self._ids[documents.strings]], axis=1)
        return torch.from_numpy(rows).to(self._device), len(opening[0])

    @torch.no_grad()
    def losses(self, documents: Documents, told: int) -> np.ndarray:
        """-log p in nats of every terminal and of the end, [B, N + 1]; 0 behind the end."""
        found = []
        with backbone.ordinary_attention(self._language):
            for part in documents.parts():
                rows, opening = self._rows(part, told)
                logits = self._language(input_ids=rows, use_cache=False).logits[:, opening - 1 :]
                probabilities = logits.double().softmax(-1).cpu().numpy()[..., self._ids]
                found.append(losses(probabilities, targets_of(part.strings, len(self._ids) - 1)))
        return np.concatenate(found)

    @torch.no_grad()
    def states(self, documents: Documents) -> list[np.ndarray]:
        """Of every layer, from the embeddings on, float32 [B, N + 1, width]: what is there behind n terminals, nothing
        told. (Of transformers' models the last one is behind the final norm.)"""
        found: list[list[np.ndarray]] = []
        with backbone.ordinary_attention(self._language):
            for part in documents.parts():
                rows, opening = self._rows(part, 0)
                states = self._language(input_ids=rows, use_cache=False, output_hidden_states=True).hidden_states
                found.append([state[:, opening - 1 :].float().cpu().numpy() for state in states])
        return [np.concatenate(layer) for layer in zip(*found, strict=True)]

    @torch.no_grad()
    def go_on(self, prefixes: Documents, told: int, seed: int) -> np.ndarray:
        """What it writes behind prefixes of one length, sampled: whole strings, [B, longest + 1]. A token that is no
        terminal is `OTHER`, and a document that does not end is longer than any of the grammar's."""
        begun = prefixes.strings.shape[1]
        symbols = np.full(self._language.config.vocab_size, OTHER)
        symbols[self._ids[:-1]] = np.arange(len(self._ids) - 1)
        strings = np.full((len(prefixes), self._longest + 1), NOTHING)
        strings[:, :begun] = prefixes.strings
        rows, opening = self._rows(prefixes, told)
        sampling = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=self._longest + 1 - begun,
            eos_token_id=self._end, pad_token_id=self._end,
        )  # fmt: skip
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), backbone.ordinary_attention(self._language):
            torch.manual_seed(seed)
            mask = torch.ones_like(rows)
            ids = self._language.generate(input_ids=rows, attention_mask=mask, generation_config=sampling)
        written = ids[:, opening + begun :].cpu().numpy()
        ended = (written == self._end).cumsum(1) > 0
        strings[:, begun : begun + written.shape[1]] = np.where(ended, NOTHING, symbols[written])
        return strings


def bayes(grammar: Grammar, documents: Documents, told: Sequence[int]) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """What one who knows the grammar reaches: for each number of latents that are told the losses, as `Reader.losses`;
    and of each latent how probable its likelier value is, [B, N + 1, D], nothing told: the accuracy to expect."""
    found: dict[int, list[np.ndarray]] = {known: [] for known in told}
    sure = []
    for part in documents.parts():
        joint = grammar.next_tokens(part.strings)
        targets = targets_of(part.strings, grammar.symbols)
        for known in told:
            found[known].append(losses(predicted(joint, grammar.allowed(part.latents, known)), targets))
        ones = np.einsum("jbn,jd->bnd", posterior(joint), grammar.latents)
        sure.append(np.maximum(ones, 1 - ones))
    return {known: np.concatenate(some) for known, some in found.items()}, np.concatenate(sure)


def probe(
    reader: Reader, fitted: Documents, tested: Documents, sure: np.ndarray, progress: Progress = lambda what, n: None
) -> Result:
    """How often a logistic regression on a hidden state tells each latent of a document, nothing told.

    `accuracy` [layer, position, latent] on documents that it was not fitted to, and `bayes` [position, latent]: the
    mean of `sure` (see `bayes`) over the same ones. At position n, n terminals have been read.
    """
    classifier = _classifier()
    before, states = reader.states(fitted), reader.states(tested)
    reach = min(_reached(fitted), _reached(tested))
    accuracy = np.zeros((len(states), reach, tested.latents.shape[1]))
    for position in range(reach):
        there, here = fitted.lengths >= position, tested.lengths >= position
        for layer, (old, new) in enumerate(zip(before, states, strict=True)):
            for latent in range(accuracy.shape[2]):
                known, truth = fitted.latents[there, latent], tested.latents[here, latent]
                if len(set(known)) == 1:
                    accuracy[layer, position, latent] = (truth == known[0]).mean()
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # one that has not converged is a probe all the same
                    classifier.fit(old[there, position], known)
                accuracy[layer, position, latent] = classifier.score(new[here, position], truth)
        progress("probing positions", position + 1)
    ideal = [sure[tested.lengths >= position, position].mean(0).tolist() for position in range(reach)]
    return {"accuracy": accuracy.tolist(), "bayes": ideal}


def grammatical(
    reader: Reader,
    grammar: Grammar,
    documents: Documents,
    told: int,
    samples: int,
    seed: int = 0,
    progress: Progress = lambda what, n: None,
) -> Result:
    """How often what is written behind the first n terminals of a document makes a document of the grammar.

    Lists by n (`prompts`): `own`, under the latents of the document that the prompt is from; `any`, under any latents;
    `bayes`, how often one who knows the grammar and samples as well hits `own` (`any` it always hits); `documents`.
    """
    reach = _reached(documents)
    found: Result = {"told": told, "prompts": [], "documents": [], "own": [], "any": [], "bayes": []}
    for length in range(0, reach, -(-reach // PROMPTS)):
        chosen = documents[documents.lengths >= length][:samples]
        prefixes = Documents(chosen.strings[:, :length], chosen.latents)
        own = grammar.allowed(chosen.latents, grammar.depth)
        written = grammar.members(reader.go_on(prefixes, told, keyed_seed("pcfg", seed, told, length)))
        exact = grammar.go_on(prefixes.strings, chosen.latents, told, keyed_rng("pcfg", seed, told, length))
        found["prompts"].append(length)
        found["documents"].append(len(chosen))
        found["own"].append(float((written & own).any(0).mean()))
        found["any"].append(float(written.any(0).mean()))
        found["bayes"].append(float((grammar.members(exact) & own).any(0).mean()))
        progress("writing behind prompts", len(found["prompts"]))
    return found


def run(
    model: str,
    folder: Path,
    out: Path | None = None,
    told: int | None = None,
    documents: int = 2000,
    samples: int = 500,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = lambda what, n: None,
) -> Result:
    """Load a model and ask it all; the numbers go to `out`/pcfg.json, the page to `out`/pcfg.html.

    Args:
        model: what `hub.load` takes.
        folder: a corpus of `mm data build pcfg`.
        told: latents that stand in front where metadata are given; None: as many as the run was trained with.
        documents: of the test split, and as many of the validation split for probes to be fitted to.
        samples: documents whose beginnings are prompts.

    Raises:
        ConfigError, DataError: model, corpus and settings do not fit.
    """
    grammar = Grammar.read(folder / "grammar.json")
    fitted, tested = (Documents(*read_split(folder, split, documents)) for split in ("validation", "test"))
    if min(len(fitted), len(tested)) < FEW:
        raise DataError(f"{folder}: under {FEW} documents to validate or test with; build it with a larger --count")
    _classifier()  # what is not installed is said before anything is computed
    told = _trained_with(model, grammar.depth) if told is None else told
    if not 0 <= told <= grammar.depth:
        raise ConfigError(f"--told {told}: the documents of {folder} have {grammar.depth} latents; expected 0 to that")
    system, layout, _ = hub.load(model, device)
    reader = Reader(system, layout, folder, grammar, model)
    out = prepared(out or Path(f"pcfg-{Path(model).resolve().name}"), str(folder))
    depths = sorted({0, told})
    ideal, sure = bayes(grammar, tested, depths)
    reach, lengths = _reached(tested), tested.lengths
    results: Result = {
        "model": model,
        "weights": weights_digest(system),
        "data": str(folder),
        "told": told,
        "seed": seed,
        "documents": {"fitted": len(fitted), "tested": len(tested)},
        "reached": [int((lengths >= position).sum()) for position in range(reach)],
        "loss": [
            {"told": known, **_by_position("model", reader.losses(tested, known), lengths, reach)}
            | _by_position("bayes", ideal[known], lengths, reach)
            for known in depths
        ],
        "probes": probe(reader, fitted, tested, sure, progress),
        "grammatical": [grammatical(reader, grammar, tested, known, samples, seed, progress) for known in depths],
    }
    write(out / "pcfg.json", results)
    (out / "pcfg.html").write_text(page(results), encoding="utf-8")
    return {"folder": str(out), **results}


def _trained_with(model: str, depth: int) -> int:
    """The latents that the sources of a run tell at most in any stage, by their `prompt: "{metadata_K}"`."""
    prompts = [source.get("prompt", "") for _, sources in hub.trained_on(model) for source in sources]
    told = [known for known in range(depth + 1) if any(f"{{metadata_{known}}}" in prompt for prompt in prompts)]
    if not told:
        raise ConfigError(f"{model}: nothing says how many latents it was told in training; give --told")
    return max(told)


def _reached(documents: Documents) -> int:
    """Positions, from 0 on, that enough documents reach."""
    lengths = documents.lengths
    return next((n for n in range(int(lengths.max()) + 1) if (lengths >= n).sum() < FEW), int(lengths.max()) + 1)


def _by_position(name: str, found: np.ndarray, lengths: np.ndarray, reach: int) -> Result:
    """The mean of losses over tokens, and their means behind each position."""
    means = [float(found[lengths >= position, position].mean()) for position in range(reach)]
    return {name: float(found.sum() / (lengths + 1).sum()), f"{name}_by_position": means}


def _classifier() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ConfigError(f"mm pcfg: needs scikit-learn ({error}); pip install scikit-learn") from None
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))


def page(results: Result) -> str:
    """What `run` found, as an HTML page."""
    losses, probes, written = results["loss"], results["probes"], results["grammatical"]
    told = [_told_words(one["told"]) for one in losses]
    at = written[0]["prompts"]

    def lines(values: Iterable[Sequence[float]], ideal: bool = False, at: Sequence[int] = ()) -> list[Line]:
        named = zip(told, values, strict=True)
        return [_line(words + ideal * ", exact", one, n, ideal, at) for n, (words, one) in enumerate(named)]

    models, exact = ([one[f"{name}_by_position"] for one in losses] for name in ("model", "bayes"))
    over = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(models, exact, strict=True)]
    whole = [*lines(models), *lines(exact, ideal=True)]
    own = [*lines((one["own"] for one in written), at=at), *lines((one["bayes"] for one in written), True, at)]
    some = lines((one["any"] for one in written), at=at)
    layers = len(probes["accuracy"])
    shown = sorted({round(number) for number in np.linspace(0, layers - 1, min(layers, len(COLOURS)))})
    told_apart = [_probe_lines(probes, latent, shown) for latent in range(len(probes["bayes"][0]))]
    low = min(y for drawn in told_apart for line in drawn for _, y in line.points)
    return render(
        "pcfg.html.j2",
        title=f"pcfg – {results['model']}",
        name=results["model"],
        facts=[results["data"], f"{count(results['documents']['tested'])} test documents", f"seed {results['seed']}"],
        headlines=[
            (f"{one['model']:.4f}", f"nats a token, {words}; the exact optimum is {one['bayes']:.4f}")
            for one, words in zip(losses, told, strict=True)
        ],
        lines=whole,
        losses=[
            ("Loss behind n terminals, nats", _chart("loss", whole, CHART, three)),
            ("What it is above the optimum, nats", _chart("loss above the optimum", lines(over), CHART, three)),
        ],
        probe_lines=told_apart[0],
        probes=[
            (f"j{latent}, accuracy", _chart(f"accuracy of j{latent}", drawn, SMALL, _percent, (min(0.4, low), 1.02)))
            for latent, drawn in enumerate(told_apart)
        ],
        fitted=results["documents"]["fitted"],
        grammatical=[
            ("Under the prompt's own latents, share", _chart("own latents", own, CHART, _percent, (0, 1.02))),
            ("Under any latents, share", _chart("any latents", some, CHART, _percent, (0, 1.02))),
        ],
        samples=max(written[0]["documents"]),
    )


def _told_words(told: int) -> str:
    return {0: "nothing told", 1: "j0 told"}.get(told, f"j0 to j{told - 1} told")


def _line(name: str, values: Sequence[float], colour: int, ideal: bool = False, at: Sequence[int] = ()) -> Line:
    """A curve over positions; what is exact is dashed."""
    style = (25 * colour + 16 * ideal) % 40  # modulo 8 it is the colour, modulo 5 the dashes
    return Line(name, [*zip(map(float, at or range(len(values))), values, strict=True)], style)


def _probe_lines(found: Result, latent: int, shown: Sequence[int]) -> list[Line]:
    lines = [
        _line(f"layer {layer}" if layer else "embeddings", [row[latent] for row in found["accuracy"][layer]], colour)
        for colour, layer in zip(COLOURS, shown, strict=False)
    ]
    return [*lines, _line("exact", [row[latent] for row in found["bayes"]], INK, ideal=True)]


def _chart(
    title: str,
    lines: Sequence[Line],
    size: tuple[int, int],
    write: Callable[[float], str],
    limits: tuple[float, float] | None = None,
) -> "Markup":
    return line_chart(title, lines, write, size, x_label="terminals read", limits=limits)


def _percent(share: float) -> str:
    return percent(share, 0)


def summary(results: Result) -> list[str]:
    """What `run` found, in a line each."""
    lines = [
        f"loss, {_told_words(one['told'])}: {one['model']:.4f} nats a token; the exact optimum is {one['bayes']:.4f}"
        for one in results["loss"]
    ]
    for one in results["grammatical"]:
        shares = ", ".join(
            f"{_percent(own)} ({_percent(exact)}) behind {length}"
            for length, own, exact in zip(one["prompts"], one["own"], one["bayes"], strict=True)
        )
        lines.append(f"grammatical (exact reader), {_told_words(one['told'])}: {shares} terminals")
    return lines
