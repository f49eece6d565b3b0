import hashlib
import io
import logging
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import sentencepiece
from seeds import fresh_seed

from z1_jax.data.tokenizer import (
    PromptTokenizer,
    discretise_state,
    kitchen_instructions,
    load_tokenizer,
    prompt_text,
    train_small_tokenizer,
)
from z1_jax.errors import UserError

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "misc.npz")
MODEL = train_small_tokenizer(kitchen_instructions())
SEED = fresh_seed(__name__)

ROBOCASA = """open the left drawer|close the right drawer|open the cabinet door|close the cabinet doors
open the microwave door|turn on the sink faucet|turn off the sink faucet|turn the sink spout to the left
turn on the front left burner of the stove|turn off the rear right burner of the stove
press the start button on the microwave|press the stop button on the microwave
press the button on the coffee machine to serve coffee
pick the apple from the counter and place it in the cabinet|pick the can from the cabinet and place it on the counter
pick the lime from the counter and place it in the sink|pick the mug from the sink and place it on the plate
pick the potato from the counter and place it in the pan on the stove
pick the mug from the cabinet and place it under the coffee machine dispenser
pick the mug from under the coffee machine dispenser and place it on the counter""".replace("\n", "|").split("|")


@pytest.fixture
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer.from_bytes(MODEL, prompt_length=48)


def test_state_bins_match_openpi():
    np.testing.assert_array_equal(discretise_state(REFERENCE["discretize/in"]), REFERENCE["discretize/out"])


def test_prompt_is_openpis():
    state = np.array([-1.5, -1.0, 0.0, 0.999, 1.0])
    expected = "Task: open the drawer now, State: -1 0 128 255 255;\nAction: "
    assert prompt_text("  open the_drawer\nnow ", state) == expected
    assert prompt_text("pick_up", None) == "pick up\n"


def test_ids_spell_the_prompt_padded_with_zeros(tokenizer):
    print("seed", SEED)
    state = np.random.default_rng(SEED).uniform(-1.2, 1.2, size=16)
    tokens, mask = tokenizer.encode("open the left drawer", state)
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape == (48,)
    count = int(mask.sum())
    assert mask[:count].all() and not tokens[count:].any()
    model = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    assert tokens[0] == model.bos_id()
    assert model.decode(tokens[1:count].tolist()) == prompt_text("open the left drawer", state)


def test_batch_is_the_single_prompts(tokenizer):
    states = np.random.default_rng(SEED).uniform(-1.2, 1.2, size=(3, 5))
    texts = ["open the drawer", "x", "turn on the sink faucet"]
    tokens, mask = tokenizer.encode_batch(texts, states)
    for row, (text, state) in enumerate(zip(texts, states, strict=True)):
        single = tokenizer.encode(text, state)
        np.testing.assert_array_equal(tokens[row], single[0])
        np.testing.assert_array_equal(mask[row], single[1])


def test_no_state_prompt_holds_no_numbers(tokenizer):
    tokens, mask = tokenizer.encode("turn on the sink faucet", None)
    assert 5 <= mask.sum() <= 8 and not set(tokens[mask].tolist()) & set(tokenizer.number_ids().tolist())


def test_each_bin_is_one_token_of_its_own(tokenizer):
    ids = tokenizer.number_ids()
    assert ids.shape == (257,) and len(set(ids.tolist())) == 257
    state = np.linspace(-1.0, 1.0, 257)[:-1] + 1e-4  # bins 0..255
    long = PromptTokenizer.from_bytes(MODEL, prompt_length=300)
    tokens, mask = long.encode("open the drawer", state)
    found = tokens[mask][np.isin(tokens[mask], ids)]
    np.testing.assert_array_equal(found, ids[1:])
    low, low_mask = long.encode("open the drawer", np.array([-2.0]))
    assert ids[0] in low[low_mask]


@pytest.mark.parametrize("text", ROBOCASA + [text.capitalize() + "." for text in ROBOCASA] + ["Zebra #7 ~ {x}?"])
def test_every_instruction_is_known_and_short(tokenizer, text):
    tokens, mask = tokenizer.encode(text, np.zeros(16))
    unknown = sentencepiece.SentencePieceProcessor(model_proto=MODEL).unk_id()
    assert unknown not in tokens[mask]
    assert mask.sum() <= 44


def test_training_is_deterministic_and_order_free(tmp_path):
    texts = kitchen_instructions()
    assert train_small_tokenizer(reversed(texts), tmp_path / "small.model") == MODEL
    loaded = load_tokenizer(tmp_path / "small.model", prompt_length=48)
    assert loaded.identity == PromptTokenizer.from_bytes(MODEL, 48).identity
    assert loaded.vocab_size <= 512
    other = train_small_tokenizer(["dance"])
    assert PromptTokenizer.from_bytes(other, 48).identity != loaded.identity


def test_overlong_prompt_loses_its_end_with_one_warning(tokenizer, caplog):
    short = PromptTokenizer.from_bytes(MODEL, prompt_length=10)
    whole, _ = tokenizer.encode("open the left drawer", np.zeros(16))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tokens, mask = short.encode("open the left drawer", np.zeros(16))
            np.testing.assert_array_equal(tokens, whole[:10])
            assert mask.all()
    assert len(caplog.records) == 1
    assert "'open the left drawer' has 2" in caplog.text and "more than prompt_length=10" in caplog.text


def big_model() -> bytes:
    """A model as PaliGemma's: digits and line breaks alone, text without a space in front, BOS 2, pad 0."""
    model = io.BytesIO()
    texts = [*kitchen_instructions(), *(str(n) for n in range(256))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=800, pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=["\n", "<loc0000>"],
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


BIG = big_model()


def openpi_tokens(model: bytes, prompt: str, state: np.ndarray | None, length: int) -> tuple[list[int], list[bool]]:
    """openpi's rules spelt out over SentencePiece: what PaligemmaTokenizer.tokenize returns."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = " ".join(prompt.strip().replace("_", " ").split("\n"))
    if state is None:
        ids = [pieces.bos_id(), *pieces.encode(text), *pieces.encode("\n")]
    else:
        bins = " ".join(str(sum(value >= -1 + k / 128 for k in range(256)) - 1) for value in state)
        ids = [pieces.bos_id(), *pieces.encode(f"Task: {text}, State: {bins};\nAction: ")]
    missing = length - len(ids)
    return (ids + [0] * missing)[:length], ([True] * len(ids) + [False] * missing)[:length]


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("model", [MODEL, BIG], ids=["small", "like PaliGemma's"])
def test_ids_are_openpis(model, with_state, rng):
    words = "open_the\nleft drawer Zebra é 水 #7 <loc0000>  pick\tUp , ;".split(" ")
    for length in (200, int(rng.integers(5, 60))):
        tokenizer = PromptTokenizer(model, length)
        prompt = " ".join(rng.choice(words, int(rng.integers(0, 9)))) + str(rng.choice(["", " ", "\n", "_"]))
        state = rng.uniform(-1.3, 1.3, int(rng.integers(1, 33))) if with_state else None
        tokens, mask = tokenizer.encode(prompt, state)
        expected = openpi_tokens(model, prompt, state, length)
        assert (tokens.tolist(), mask.tolist()) == expected, repr(prompt)


def test_ids_are_those_of_transformers(tmp_path, rng):
    """The hub's own tokenizer class over the same file, its vocabulary checked: built bare, it knows five tokens."""
    from transformers import GemmaTokenizer

    (tmp_path / "tokenizer.model").write_bytes(BIG)
    theirs = GemmaTokenizer.from_pretrained(tmp_path, vocab_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path, 120, vocab_size=800)
    assert len(theirs) >= ours.vocab_size == 800
    for instruction in rng.choice(ROBOCASA, 5):
        state = rng.uniform(-1.2, 1.2, 16)
        ids = theirs(prompt_text(instruction, state), add_special_tokens=False)["input_ids"]
        tokens, mask = ours.encode(instruction, state)
        assert tokens[mask].tolist() == [theirs.bos_token_id, *ids]


def test_digits_of_their_own_give_no_number_ids():
    assert PromptTokenizer(BIG, 100).number_ids() is None


def test_directories_and_wrong_sources(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODEL)
    assert load_tokenizer(tmp_path, 48).model_bytes == MODEL
    with pytest.raises(ValueError, match="expected 257152"):
        load_tokenizer(tmp_path, 48, vocab_size=257_152)
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere\.model.*paligemma_tokenizer\.model"):
        load_tokenizer(tmp_path / "nowhere.model", 48)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model", 48)
    with pytest.raises(ValueError, match="holds 2 .model files"):
        load_tokenizer(tmp_path, 48)


def test_hub_names_are_taken_from_the_cache(tmp_path):
    """Offline, in a process of its own: where the hub's files lie is decided when it is imported."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--kitchen--small"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "tokenizer.model").write_bytes(MODEL)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """
        from z1_jax.data.tokenizer import load_tokenizer
        print(load_tokenizer("kitchen/small", 48).identity)
        try:
            load_tokenizer("kitchen/other", 48)
        except ValueError as error:
            print(error)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    identity, error = run.stdout.strip().splitlines()
    assert identity == hashlib.sha256(MODEL).hexdigest()
    assert error.startswith("no file or directory kitchen/other, and the hub gives no tokenizer.model of that name")


def test_empty_directory_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="holds 0 .model files, expected one: .*/tokenizer.model") as error:
        load_tokenizer(tmp_path, 48)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=300 is too small"):
        train_small_tokenizer(["open the drawer"], vocab_size=300)
    with pytest.raises(ValueError, match="without texts"):
        train_small_tokenizer([" "])
