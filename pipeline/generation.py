"""A causal language model in a folder that writes continuations and gives next-token distributions.

Loaded by transformers, from the folder alone: no network, no pickles, no code out of the folder. What it writes is
decided here and not by `generate()`, whose defaults come from each model's own `generation_config.json` (a repetition
penalty there would hide what is to be measured): the most probable token, or a token drawn by a uniform number that is
a function of the seed, the prompt and the place alone, so that every model meets the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from mergepipe.errors import CheckpointError, UsageError
from mergepipe.pipeline.stability import entropies
from mergepipe.storage.checkpoint import open_checkpoint

BATCH = 16
"""Prompts of the same length that are continued together."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen.

    Attributes
    ----------
    tokens : int
        Most tokens of a continuation.
    temperature : float
        0 for the most probable token (of several the lowest id); else logits are divided by it and a token is drawn.
    samples : int
        Continuations of each prompt; 1 where nothing is drawn.
    seed : int
    """

    tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote.

    Attributes
    ----------
    prompt : tuple of int
        Token ids that it was given.
    tokens : tuple of int
        Token ids that it wrote, without the end token.
    entropies : tuple of float
        Entropy in nats, before temperature, of the distribution that each of `tokens` was chosen from.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    entropies: tuple[float, ...]


class LanguageModel:
    """A model and its tokenizer, ready to write and to be asked.

    Parameters
    ----------
    folder : path
        As `save_pretrained` writes it, safetensors, with a tokenizer.
    device : str
        As torch names it.
    dtype : {'float32', 'stored'}
        What the weights are held and multiplied in.

    Attributes
    ----------
    ids : dict of str to int
        Every token of the tokenizer, and its id.
    names : dict of int to str
        The same the other way round.
    width : int
        Number of logits, which may be more than there are tokens.

    Raises
    ------
    CheckpointError
        If the folder holds no causal language model with all its weights, or no tokenizer that fits it.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> None:
        self.folder = Path(folder)
        open_checkpoint(self.folder)
        self.model = self._load_model(dtype).to(device).eval()
        self.tokenizer = self._load_tokenizer()
        self.ids: dict[str, int] = self.tokenizer.get_vocab()
        self.names = {number: name for name, number in self.ids.items()}
        self.width = int(self.model.config.get_text_config().vocab_size)
        self.device = device
        if max(self.ids.values(), default=-1) >= self.width:
            raise CheckpointError(
                f"the tokenizer of '{folder}' has ids up to {max(self.ids.values())}, its weights logits for "
                f"{self.width} tokens: they do not belong together"
            )
        self.ends = self._end_tokens()

    def _load_model(self, dtype: str) -> Any:
        wanted = torch.float32 if dtype == "float32" else "auto"
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=wanted,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever another library makes of files that we know nothing about
            raise self._refused("as a causal language model", error) from error
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(
                f"'{self.folder}' is no whole causal language model ({type(model).__name__}): it lacks "
                f"{len(missing)} tensors, '{missing[0]}' among them. Only models that predict the next token are judged"
            )
        return model

    def _load_tokenizer(self) -> Any:
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(f"'{self.folder}' holds no tokenizer: put the tokenizer files of the model into it")
        try:
            return transformers.AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # as above
            raise self._refused("the tokenizer of", error) from error

    def _refused(self, what: str, error: Exception) -> CheckpointError:
        reason = (str(error).splitlines() or [""])[0]
        subject = f"{what} '{self.folder}'" if what.endswith("of") else f"'{self.folder}' {what}"
        return CheckpointError(f"transformers does not load {subject}: {type(error).__name__}: {reason}")

    def _end_tokens(self) -> frozenset[int]:
        found: set[int] = set()
        for holder in (self.model.generation_config, self.model.config, self.tokenizer):
            value = getattr(holder, "eos_token_id", None)
            found |= {value} if isinstance(value, int) else set(value or ())
        return frozenset(found)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a prompt, with what the tokenizer puts around it.

        Raises
        ------
        UsageError
            If nothing is left of the prompt.
        """
        ids = tuple(int(number) for number in self.tokenizer(prompt)["input_ids"])
        if not ids:
            raise UsageError(f"the tokenizer of '{self.folder}' makes no token of the prompt {prompt[:60]!r}")
        return ids

    def check_length(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> None:
        """Refuse prompts that leave no room for `tokens` more."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        for number, prompt in enumerate(prompts, 1):
            if isinstance(most, int) and len(prompt) + tokens > most:
                raise UsageError(
                    f"prompt {number} is {len(prompt)} tokens long; with {tokens} more it exceeds the {most} positions "
                    f"of '{self.folder}': shorten it, or ask for fewer tokens"
                )

    def write(self, prompts: Sequence[tuple[int, ...]], decoding: Decoding) -> list[Continuation]:
        """Continue every prompt.

        Parameters
        ----------
        prompts : sequence of tuple of int
            Token ids; at least one in each.
        decoding : Decoding

        Returns
        -------
        list of Continuation
            `decoding.samples` of the first prompt, of the second, and so on.
        """
        jobs = [(n, s) for n in range(len(prompts)) for s in range(decoding.samples)]
        jobs.sort(key=lambda job: len(prompts[job[0]]))
        found: dict[tuple[int, int], Continuation] = {}
        for batch in _batches(jobs, [len(prompts[n]) for n, _ in jobs]):
            draws = np.stack([_uniform(decoding, n, s) for n, s in batch])
            found |= zip(batch, self._continue([prompts[n] for n, _ in batch], draws, decoding), strict=True)
        return [found[job] for job in sorted(found)]

    def _continue(
        self, prompts: Sequence[tuple[int, ...]], draws: npt.NDArray[np.float64], decoding: Decoding
    ) -> list[Continuation]:
        """Continuations of prompts of one length."""
        given = torch.tensor(prompts, device=self.device)
        cache: Any = None
        ended = np.zeros(len(prompts), bool)
        written: list[list[int]] = [[] for _ in prompts]
        surprise: list[list[float]] = [[] for _ in prompts]
        for place in range(decoding.tokens):
            with torch.inference_mode():
                kept = {} if cache is None else {"past_key_values": cache}
                output = self.model(given, use_cache=True, **kept)
            logits = output.logits[:, -1].to("cpu", torch.float64).numpy()
            self._check(logits)
            spread = entropies(logits)
            chosen = _choose(logits, draws[:, place], decoding.temperature)
            ended |= np.isin(chosen, list(self.ends))
            for k in np.flatnonzero(~ended):
                written[k].append(int(chosen[k]))
                surprise[k].append(float(spread[k]))
            if ended.all():
                break
            following = torch.from_numpy(chosen[:, None]).to(self.device)
            cache = getattr(output, "past_key_values", None)
            given = following if cache is not None else torch.cat([given, following], dim=1)
        return [
            Continuation(prompt, tuple(tokens), tuple(spread))
            for prompt, tokens, spread in zip(prompts, written, surprise, strict=True)
        ]

    def _check(self, logits: npt.NDArray[np.floating[Any]]) -> None:
        """Refuse rows that are no distribution; single tokens may be ruled out by minus infinity."""
        if not np.isfinite(logits.max(axis=-1)).all():
            raise CheckpointError(f"'{self.folder}' gives logits that are NaN or infinite: its weights overflow")

    def read(self, tokens: Sequence[int], first: int) -> npt.NDArray[np.float32]:
        """Logits of every place from `first` on that has a token before it.

        Parameters
        ----------
        tokens : sequence of int
            What is read, ``first`` or more tokens.
        first : int
            1 or more: how many tokens stand before the first place that is asked for.

        Returns
        -------
        float32 ndarray, shape (len(tokens) - first + 1, width)
            Row i is the model's guess at the token after the first ``first + i`` of them. New.
        """
        with torch.inference_mode():
            output = self.model(torch.tensor([tokens], device=self.device), use_cache=False)
        logits: npt.NDArray[np.float32] = output.logits[0, first - 1 :].to("cpu", torch.float32).numpy()
        self._check(logits)
        return logits


def _uniform(decoding: Decoding, prompt: int, sample: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each token of a continuation."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([decoding.seed, prompt, sample]))).random(
        decoding.tokens
    )


def _choose(
    logits: npt.NDArray[np.float64], draws: npt.NDArray[np.float64], temperature: float
) -> npt.NDArray[np.int64]:
    """The next token of each row of `logits`."""
    if temperature == 0:
        return np.asarray(logits.argmax(axis=-1))
    scaled = logits / temperature
    cumulated = np.exp(scaled - scaled.max(axis=-1, keepdims=True)).cumsum(axis=-1)
    found = [np.searchsorted(row, draw * row[-1], "right") for row, draw in zip(cumulated, draws, strict=True)]
    # Rounding may lead past the last token that has a probability, which is where the sum is full.
    return np.asarray(np.minimum(np.array(found, np.int64), cumulated.argmax(axis=-1)))


def _batches(jobs: Sequence[tuple[int, int]], lengths: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Neighbouring jobs of one length, at most :data:`BATCH` at a time."""
    batch: list[tuple[int, int]] = []
    for number, (job, length) in enumerate(zip(jobs, lengths, strict=True)):
        if batch and (len(batch) == BATCH or length != lengths[number - 1]):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
