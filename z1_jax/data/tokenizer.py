"""Prompts to token ids, as π0.5 wants them, by PaliGemma's SentencePiece model or a small one of the kitchen's own.

Knows text and normalised states; nothing of images, statistics or environments.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Float

from z1_jax.errors import UserError, first_line
from z1_jax.files import absolute

PALIGEMMA = "google/paligemma-3b-pt-224"
PALIGEMMA_VOCAB_SIZE = 257_152
STATE_BINS = 256
PAD_ID = 0

_logger = logging.getLogger(__name__)

_EDGES = np.linspace(-1.0, 1.0, STATE_BINS + 1)[:-1]
_NUMBERS = tuple(str(value) for value in range(-1, STATE_BINS))
_SEPARATORS = ("Task:", ",▁State:", ";\nAction:▁", "\n")  # the fixed parts of a prompt, one token each
_PRINTABLE = "".join(chr(code) for code in range(33, 127))

_OBJECTS = (
    *(
        "apple",
        "banana",
        "bagel",
        "bar of soap",
        "beer",
        "bell pepper",
        "bottled water",
        "bowl",
        "bread",
        "can",
        "carrot",
    ),
    *("cheese", "coffee cup", "corn", "cucumber", "cup", "egg", "eggplant", "garlic", "jam", "kettle", "lemon", "lime"),
    *("mango", "milk", "mug", "mushroom", "onion", "orange", "pan", "peach", "plate", "pot", "potato", "sponge"),
    *("squash", "sweet potato", "tomato", "vegetable", "fruit", "box", "ball", "block", "container"),
)
_KITCHEN_OBJECTS = ("can", "carton", "lime", "eggplant", "cup", "lemon")  # what stands in the built-in kitchen
_PLACES = (
    *("counter", "sink", "cabinet", "microwave", "pan on the stove", "plate on the counter", "stove"),
    *("plate", "bowl", "container", "basin", "burner", "container on the counter"),
)
_BURNERS = tuple(f"{row}{column}" for row in ("front ", "rear ", "back ", "") for column in ("left", "right", "center"))


def discretise_state(state: Float[np.ndarray, "... D"]) -> np.ndarray:
    """Bins of a normalised state [..., D]: int64, 0..255 over [-1, 1), -1 below and 255 above (openpi)."""
    return np.digitize(state, _EDGES) - 1


def prompt_text(instruction: str, state: Float[np.ndarray, " D"] | None) -> str:
    """The prompt of π0.5; without a state, the bare instruction and a line break (openpi's LIBERO setting)."""
    text = _clean(instruction)
    return text + "\n" if state is None else _with_bins(text, discretise_state(state))


def _clean(instruction: str) -> str:
    return instruction.strip().replace("_", " ").replace("\n", " ")


def _with_bins(text: str, bins: Iterable[int]) -> str:
    return f"Task: {text}, State: {' '.join(_NUMBERS[b + 1] for b in bins)};\nAction: "


class PromptTokenizer:
    """Instruction and state to a fixed number of token ids.

    Attributes:
        vocab_size: ids are below it; a model's embedding needs at least so many rows.
        prompt_length: tokens of a prompt with its padding, L.
        identity: SHA-256 of the model, kept in checkpoints: other ids are another policy.
        model_bytes: the SentencePiece model; small enough to travel with a checkpoint.
    """

    def __init__(self, model_bytes: bytes, prompt_length: int, source: str = "tokenizer"):
        """From the bytes of a SentencePiece model; `source` names it in errors.

        Raises:
            ValueError: the bytes are no SentencePiece model, or `prompt_length` is not positive.
        """
        if prompt_length < 1:
            raise ValueError(f"prompt_length is {prompt_length}; expected at least 1 token")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{source} is not a SentencePiece model ({error}); expected a .model file") from None
        self.vocab_size: int = self._model.vocab_size()
        self.prompt_length = prompt_length
        self.identity = hashlib.sha256(model_bytes).hexdigest()
        self.model_bytes = model_bytes
        self._warned = False

    @classmethod
    def from_bytes(cls, model_bytes: bytes, prompt_length: int) -> PromptTokenizer:
        """The tokenizer that a checkpoint holds."""
        return cls(model_bytes, prompt_length, "the checkpoint's tokenizer")

    def encode(self, instruction: str, state: Float[np.ndarray, " D"] | None) -> tuple[np.ndarray, np.ndarray]:
        """One prompt: (ids int32 [L], mask bool [L]); `state` [D] is normalised and unpadded, or None."""
        tokens, mask = self.encode_batch([instruction], None if state is None else state[None])
        return tokens[0], mask[0]

    def encode_batch(
        self, instructions: Sequence[str], states: Float[np.ndarray, "B D"] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of instructions [B] and normalised states [B, D]: (ids int32 [B, L], mask bool [B, L]).

        As in openpi, a prompt of more than L tokens loses its end, the state's last numbers first; the first time this
        is a warning in the log.
        """
        ids = self.prompt_ids(instructions, states)
        tokens = np.full((len(ids), self.prompt_length), PAD_ID, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, prompt in enumerate(ids):
            kept = prompt[: self.prompt_length]
            tokens[row, : len(kept)] = kept
            mask[row, : len(kept)] = True
        self._warn_of_cut(instructions, ids)
        return tokens, mask

    def prompt_ids(self, instructions: Sequence[str], states: Float[np.ndarray, "B D"] | None) -> list[list[int]]:
        """The ids of each whole prompt, BOS first, of any length: what `encode_batch` cuts and pads."""
        texts = [_clean(instruction) for instruction in instructions]
        if states is None:
            # openpi encodes the line break by itself, so that no token can span the instruction's end.
            end = self._model.encode("\n")
            return [ids + end for ids in self._model.encode(texts, add_bos=True, num_threads=1)]
        bins = discretise_state(states).tolist()
        prompts = [_with_bins(*pair) for pair in zip(texts, bins, strict=True)]
        return self._model.encode(prompts, add_bos=True, num_threads=1)

    def number_ids(self) -> np.ndarray | None:
        """int32 [257]: the id of each state bin -1..255 (with its leading space), to start embeddings smoothly.

        None where a number takes several tokens, as in PaliGemma's vocabulary.
        """
        encoded = self._model.encode([f" {number}" for number in _NUMBERS])
        if any(len(ids) != 1 for ids in encoded):
            return None
        return np.asarray(encoded, np.int32)[:, 0]

    def _warn_of_cut(self, instructions: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        longest = max(range(len(ids)), key=lambda row: len(ids[row]), default=None)
        if longest is None or len(ids[longest]) <= self.prompt_length or self._warned:
            return
        self._warned = True
        _logger.warning(
            "the prompt of %r has %d tokens, more than prompt_length=%d: its end is cut, and so is that of every such "
            "prompt from here on; shorten the instruction or use a policy with a longer prompt",
            instructions[longest],
            len(ids[longest]),
            self.prompt_length,
        )


def load_tokenizer(source: str | pathlib.Path, prompt_length: int, vocab_size: int | None = None) -> PromptTokenizer:
    """A tokenizer from a SentencePiece `.model` file, a directory that holds one, or a repository of the hub.

    `vocab_size` is the size that the policy was made for (PaliGemma: 257,152).

    Raises:
        UserError: nothing is there, it is no tokenizer, or its vocabulary has another size.
    """
    path = _model_file(str(source))
    try:
        tokenizer = PromptTokenizer(path.read_bytes(), prompt_length, str(path))
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    if vocab_size is not None and tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, expected {vocab_size}; "
            "give the tokenizer that the policy was trained with"
        )
    return tokenizer


def _model_file(source: str) -> pathlib.Path:
    """The `.model` file that `source` names; a hub repository's is downloaded, or taken from its cache."""
    path = absolute(source)
    if path.is_file():
        return path
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        if len(models) != 1:
            raise UserError(
                f"{path} holds {len(models)} .model files, expected one: PaliGemma's SentencePiece model "
                f"{path / 'tokenizer.model'} (a tokenizer.json does not replace it); or name the file itself"
            )
        return models[0]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) or source.endswith(".model"):
        raise UserError(
            f"no tokenizer at {source}; expected PaliGemma's SentencePiece model (paligemma_tokenizer.model or "
            f"tokenizer.model), a directory that holds it, or the hub name {PALIGEMMA}"
        )
    from transformers.utils import cached_file  # a second to import

    try:
        return pathlib.Path(str(cached_file(source, "tokenizer.model")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no file or directory {source}, and the hub gives no tokenizer.model of that name ({first_line(error)}); "
            "accept its licence and run `hf auth login`, or give the path of a local tokenizer.model"
        ) from None


def train_small_tokenizer(texts: Iterable[str], path: str | pathlib.Path | None = None, vocab_size: int = 512) -> bytes:
    """Trains a SentencePiece BPE model on instructions; returns its bytes and writes them to `path`.

    Each state bin " -1" .. " 255" and each fixed part of the prompt is one token, and all of printable ASCII is
    covered. The same texts give the same bytes; one given several times weighs more. Few texts may fill fewer than
    `vocab_size` tokens.

    Raises:
        ValueError: no texts, or a vocabulary too small for the fixed tokens.
    """
    sentences = sorted(text.strip() for text in texts if text.strip())
    if not sentences:
        raise ValueError("cannot train a tokenizer without texts; give the instructions of the tasks")
    symbols = [*_SEPARATORS, *(f"▁{number}" for number in _NUMBERS)]
    smallest = len(symbols) + len(_PRINTABLE) + 64
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is too small; expected at least {smallest} for bins and characters")
    # Every word counts with the space before it, as it stands in the prompt.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f" {text}" for text in sentences]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=PAD_ID,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=symbols,
        required_chars=_PRINTABLE,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    if path is not None:
        pathlib.Path(path).write_bytes(model.getvalue())
    return model.getvalue()


def kitchen_instructions() -> list[str]:
    """Sentences with every word of the 24 kitchen tasks' instructions: what the small tokenizer is trained on.

    Those of the fixtures and of the built-in kitchen are repeated: each of their words becomes one token. Other objects
    take several.
    """
    sides = ("", "left ", "right ")
    doors = ("cabinet door", "cabinet doors", "microwave door", "drawer")
    texts = [f"{verb} the {side}{door}" for verb in ("open", "close") for side in sides for door in doors]
    texts += [f"turn {way} the {burner} burner of the stove" for way in ("on", "off") for burner in _BURNERS]
    texts += [f"turn {way} the {thing}" for way in ("on", "off") for thing in ("sink faucet", "microwave", "stove")]
    texts += [f"turn the sink spout to the {side}" for side in ("left", "right")]
    texts += [f"press the {name} button on the microwave" for name in ("start", "stop")]
    texts += ["press the button on the coffee machine to serve coffee", "press the start button on the coffee machine"]
    for place in ("cabinet", "counter"):
        texts += [f"pick the mug from the {place} and place it under the coffee machine dispenser"]
        texts += [f"pick the mug from under the coffee machine dispenser and place it on the {place}"]
    moves = [f"pick the {thing} from the {start} and place it {end}" for thing, start, end in _moves()]
    texts += [f"pick the {thing} from the counter and place it in the sink" for thing in _KITCHEN_OBJECTS]
    return 32 * texts + [text.capitalize() + "." for text in texts] + moves


def _moves() -> list[tuple[str, str, str]]:
    """(thing, start, end): each object once in and once on, with the places taken in turn."""
    count = len(_PLACES)
    return [
        (thing, _PLACES[i % count], f"{preposition} the {_PLACES[(i + shift) % count]}")
        for preposition, shift in (("in", 1), ("on", 3))
        for i, thing in enumerate(_OBJECTS)
    ]
