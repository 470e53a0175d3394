"""Text after prompts: from any model that writes, in batches, until it ends."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.checkpoints.export.companion_files import FOLDER, run_of
from distrain.config import UserError
from distrain.datasets.base import Batch, DataMeta
from distrain.datasets.labels import IGNORED
from distrain.datasets.randomness import stream_of, uniform
from distrain.inference.trained import Trained, writes
from distrain.networks.decoding import Decoder, PlainDecoder, PlainPairDecoder, Sampling, checked, decode
from distrain.networks.huggingface import generate, is_transformers
from distrain.system.bounded_json import RECORD, read_json

logger = logging.getLogger(__name__)

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_REMEMBERED = 16
"""Tokens of a prompt that are decoded with what follows: whether a word begins with a space depends on them."""
_MOST_BROKEN = 8
"""Characters that a tokenizer can show as broken until their last token is there."""


@dataclass(frozen=True)
class GenerationOptions:
    """How prompts are continued."""

    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    """A text ends before the first of these that it would contain."""
    seed: int = 0
    """With the number of a prompt and the place of a token in its text it determines what is drawn."""


@dataclass(frozen=True)
class Generated:
    """What a model has written after a prompt."""

    text: str
    tokens: int
    """As many were generated for it, without the end token."""
    finish: str
    """Why it ended: `end` (the end token), `stop` (a stop text), `length` (max_new_tokens), `context` (positions)."""


class TextStream:
    """Text that grows by tokens, of which only whole characters are there, and no part of a stop text.

    The end of a text may be the beginning of a character or of a stop text. It is held back until the next tokens show
    what it is.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = (), stops: Sequence[str] = ()):
        """`before`: the tokens that the text follows."""
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._ids = list(before[-_REMEMBERED:])
        self._begin, self._read = 0, len(self._ids)
        self._prefix = decode(self._ids)
        self._text = ""
        """All that is decoded, with what is held back."""
        self.shown = 0
        """Characters of it that are final."""
        self.stopped = False

    @property
    def text(self) -> str:
        """What is final."""
        return self._text[: self.shown]

    def push(self, token: int) -> str:
        """Append a token; returns what is now final in addition."""
        self._ids.append(token)
        return self._grow(last=False)

    def finish(self) -> str:
        """End the text; returns what was held back."""
        return "" if self.stopped else self._grow(last=True)

    def _grow(self, *, last: bool) -> str:
        whole = self._decode(self._ids[self._begin :])
        new = whole[len(self._prefix) :]
        kept = new.rstrip(_BROKEN)
        if last or len(new) - len(kept) > _MOST_BROKEN:
            kept = new  # it is no character that is still to be completed
        if kept:
            self._text += kept
            if kept == new:
                # what follows is decoded after these tokens alone: the time for a token must not grow with the text
                self._begin, self._read = self._read, len(self._ids)
                self._prefix = self._decode(self._ids[self._begin :])
            else:
                self._prefix = whole[: len(whole) - len(new) + len(kept)]
        found = [at for stop in self._stops if (at := self._text.find(stop, max(0, self.shown - len(stop)))) >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(self._text) - (0 if last else self._begun_stop())
        before, self.shown = self.shown, max(end, self.shown)
        return self._text[before : self.shown]

    def _begun_stop(self) -> int:
        """Return how many characters at the end of the text may begin a stop text."""
        sizes = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(self._text)), 0, -1)
            if self._text.endswith(stop[:size])
        )
        return max(sizes, default=0)


class _Row:
    """One prompt's text as it is written."""

    def __init__(self, stream: TextStream, limit: int, end_ids: frozenset[int], at_limit: str):
        self._stream, self._limit, self._end_ids, self._at_limit = stream, limit, end_ids, at_limit
        self._tokens = 0
        self._finish: str | None = None

    def accept(self, token: int, show: Callable[[str], None] | None = None) -> bool:
        """Append a token; returns whether the text has ended."""
        text = ""
        if token in self._end_ids:
            self._finish = "end"
        else:
            self._tokens += 1
            text = self._stream.push(token)
            if self._stream.stopped:
                self._finish = "stop"
            elif self._tokens == self._limit:
                self._finish = self._at_limit
        if self._finish is not None:
            text += self._stream.finish()
            if self._stream.stopped:  # by what was held back
                self._finish = "stop"
        if show is not None and text:
            show(text)
        return self._finish is not None

    def result(self) -> Generated:
        assert self._finish is not None
        return Generated(self._stream.text, self._tokens, self._finish)


class Generator:
    """Writes text with a trained model."""

    def __init__(self, trained: Trained):
        """Raises UserError for a model or a data set that does not write text."""
        recipe, data = trained.recipe, trained.data
        if not writes(recipe):
            raise UserError(
                f"{trained.checkpoint} was trained for task {recipe.task.name}, which writes no text; use `distrain "
                "predict`, or a run of task language_modeling or seq2seq"
            )
        if data.meta.decode is None:
            raise UserError(
                f"data set {recipe.data.name!r} cannot turn tokens into text; give its `meta` a function `decode`"
            )
        self._trained = trained
        self._model: Any = trained.model
        self.pairs = recipe.form == "seq2seq"
        self._decode = data.meta.decode
        self._device = trained.world.device
        self._positions: int | None = None
        """As many as a text may have with its prompt; None where it may be longer."""
        self._readable: int | None = None
        """Tokens that a prompt may have."""
        self._end_ids = frozenset([] if data.meta.eos_id is None else [data.meta.eos_id])
        self._continue: Any = self._with_decoder
        self._open: Callable[[int], Decoder] | None = getattr(self._model, "open_decoder", None)
        if is_transformers(self._model):
            self._continue = self._with_transformers
            config = self._model.config
            self._positions = self._readable = getattr(config, "max_position_embeddings", None)
            self._end_ids |= _end_tokens(trained)
        elif self._open is None:
            logger.info("%s keeps no cache, so each token reads the whole text again", type(self._model).__name__)
            self._open = self._plain
        if not self.pairs and self._positions is None:
            self._readable = self._context()

    def _context(self) -> int | None:
        """Return how many tokens a language model reads at once."""
        size = getattr(self._model, "seq_len", None)
        return size if isinstance(size, int) else self._trained.data.meta.tokens_per_sample

    def _plain(self, room: int) -> Decoder:
        def forward(inputs: Any) -> Tensor:
            return self._trained.objective.call(self._model, inputs).logits

        meta = self._trained.data.meta
        if self.pairs:
            if meta.bos_id is None:
                raise UserError("the data set's `meta` has no `bos_id`, the token with which a target begins; add it")
            return PlainPairDecoder(forward, meta.pad_id or 0, meta.bos_id, self._device)
        return PlainDecoder(forward, self._readable or room, self._device)

    def check(self, prompt: Sequence[int], where: str) -> None:
        """Raise UserError for a prompt that cannot be continued; `where` names it."""
        if not len(prompt):
            raise UserError(f"{where} is empty; a prompt needs at least one token")
        room = self._readable
        if room is not None and len(prompt) > (room if self.pairs or self._positions is None else room - 1):
            more = "positions" if self._positions is not None else "tokens in its context"
            raise UserError(f"{where} has {len(prompt)} tokens, and the model {room} {more}; shorten it")

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        numbers: Sequence[int] | None = None,
        show: Callable[[str], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Generated]:
        """Return what follows each prompt, of tokens that `check` has passed.

        `numbers`: of the prompts, which decide what is drawn for them; by default from 0. What is written does not
        depend on the other prompts. `show` gets the text of a single prompt as it becomes final. `limits`: of new
        tokens of each prompt, in place of `max_new_tokens`.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        wanted = [options.max_new_tokens] * len(prompts) if limits is None else list(limits)
        results: list[Generated | None] = [None] * len(prompts)
        for group, most in self._groups(prompts, wanted):
            rows = [
                _Row(
                    TextStream(self._decode, () if self.pairs else prompts[at], options.stops),
                    min(most, wanted[at]),
                    self._end_ids,
                    "length" if wanted[at] <= most else "context",
                )
                for at in group
            ]
            steps = max(min(most, wanted[at]) for at in group)
            ids = np.array([numbers[at] for at in group])[:, None]
            draws = torch.from_numpy(uniform(stream_of(options.seed, ids, np.arange(steps)))).to(self._device)
            accept = partial(_accept, rows, show)
            self._continue([prompts[at] for at in group], accept, options.sampling, draws)
            for at, row in zip(group, rows, strict=True):
                results[at] = row.result()
        return [each for each in results if each is not None]

    def _groups(self, prompts: Sequence[Sequence[int]], wanted: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Yield the prompts to continue together, and the most new tokens that the model has positions for.

        Rows of one batch of a transformers model have one last position, which is that of the longest. Prompts that
        are cut short by it are continued with others of their length alone, so that no text is shorter for the sake
        of another.
        """
        positions = self._positions
        everywhere = list(range(len(prompts)))
        if positions is None or self.pairs:
            # the target of a pair begins with a token of its own
            yield everywhere, max(wanted) if positions is None else positions - 1
            return
        free = [at for at in everywhere if len(prompts[at]) + max(wanted) <= positions]
        if free:
            yield free, max(wanted)
        for length in sorted({len(prompts[at]) for at in set(everywhere) - set(free)}):
            yield [at for at in everywhere if len(prompts[at]) == length], positions - length

    def _with_decoder(
        self,
        prompts: Sequence[Sequence[int]],
        accept: Callable[[int, int], bool],
        sampling: Sampling,
        draws: Tensor,
    ) -> None:
        assert self._open is not None
        decoder = self._open(max(map(len, prompts)) + draws.shape[1])
        decode(decoder, prompts, accept, sampling, lambda step: draws[:, step])
        if decoder.slid:
            logger.warning(
                "a text became longer than the %s tokens that the model reads at once; it continues from the last half "
                "of them, each time that they are full",
                self._readable,
            )

    def _with_transformers(
        self,
        prompts: Sequence[Sequence[int]],
        accept: Callable[[int, int], bool],
        sampling: Sampling,
        draws: Tensor,
    ) -> None:
        from transformers import LogitsProcessor, StoppingCriteria

        meta, device = self._trained.data.meta, self._device
        pad_id = meta.pad_id or 0
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        step = 0

        class Choose(LogitsProcessor):
            """Leaves one token to the greedy choice of transformers: the one that distrain draws."""

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                chosen = sampling.choose(scores, draws[:, step])
                checked(chosen[~done])
                return torch.full_like(scores, -torch.inf).scatter_(1, chosen.clamp(min=0)[:, None], 0.0)

        class Accept(StoppingCriteria):
            """Ends each row as every model's rows are ended."""

            def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
                nonlocal step, done
                ended = done.tolist()
                for row, token in enumerate(input_ids[:, -1].tolist()):
                    ended[row] = ended[row] or accept(row, token)
                done = torch.tensor(ended, device=device)
                step += 1
                return done

        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            # a decoder continues the end of its input; an encoder's positions count from its beginning
            place = slice(0, len(prompt)) if self.pairs else slice(longest - len(prompt), longest)
            tokens[row, place] = torch.tensor(prompt)
            mask[row, place] = 1
        generate(
            self._model,
            tokens.to(device),
            mask.to(device),
            max_new_tokens=draws.shape[1],
            pad_id=pad_id,
            bos_id=meta.bos_id,
            starts=self.pairs,
            logits_processor=[Choose()],
            stopping_criteria=[Accept()],
        )


def unpadded(batch: Batch, meta: DataMeta, pairs: bool) -> list[list[int]]:
    """Return the tokens of each row of a batch, of pairs of its source, without padding.

    Of a row of several documents they are those of the first.
    """
    inputs = batch["inputs"]
    if not isinstance(inputs, dict):
        inputs = {"input_ids": inputs}
    rows: list[list[int]] = inputs["source" if pairs else "input_ids"].tolist()
    if "lengths" in batch:
        return [row[:length] for row, length in zip(rows, batch["lengths"].tolist(), strict=True)]
    if "attention_mask" in inputs:
        masks = inputs["attention_mask"].tolist()
        return [list(itertools.compress(row, mask)) for row, mask in zip(rows, masks, strict=True)]
    if "position_ids" in inputs:
        ends = [
            next(at for at in range(1, len(row) + 1) if row[at : at + 1] != [row[at - 1] + 1])
            for row in inputs["position_ids"].tolist()
        ]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]
    for row in rows:
        while len(row) > 1 and row[-1] == meta.pad_id:
            row.pop()
    return rows


def before_answers(batch: Batch, rows: Sequence[list[int]]) -> list[list[int]]:
    """Return the tokens of each conversation (`unpadded`) up to where the assistant's last turn begins.

    A row whose first token is followed by a target already is returned whole: where its answers begin is not known.
    """
    learned = (batch["targets"] != IGNORED).tolist()
    found = []
    for row, targets in zip(rows, learned, strict=True):
        begins = [at for at in range(1, len(row)) if targets[at] and not targets[at - 1]]
        found.append(row[: begins[-1] + 1] if begins and not targets[0] else row)
    return found


def _accept(rows: Sequence[_Row], show: Callable[[str], None] | None, row: int, token: int) -> bool:
    return rows[row].accept(token, show)


def _end_tokens(trained: Trained) -> frozenset[int]:
    """Return the end tokens in the settings of the folder that a model started from, which may be several."""
    if "path" not in trained.recipe.model.args:
        return frozenset()
    folders = (run_of(trained.checkpoint) / FOLDER, Path(trained.recipe.model.args["path"]))
    file = next((each for folder in folders if (each := folder / "generation_config.json").is_file()), None)
    found = None if file is None else read_json(file, RECORD).get("eos_token_id")
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
