import hashlib
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import sentencepiece

from z1_jax.data.tokenizer import (
    PromptTokenizer,
    discretise_state,
    kitchen_instructions,
    load_tokenizer,
    prompt_text,
    train_small_tokenizer,
)

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "misc.npz")
MODEL = train_small_tokenizer(kitchen_instructions())
SEED = int(np.random.default_rng().integers(2**31))

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


def test_overlong_prompt_names_the_length():
    tokenizer = PromptTokenizer.from_bytes(MODEL, prompt_length=10)
    with pytest.raises(ValueError, match=r"has 2\d tokens, more than prompt_length=10; raise prompt_length"):
        tokenizer.encode("open the left drawer", np.zeros(16))


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
    assert error.startswith("cannot get tokenizer.model of kitchen/other from the hub")


def test_empty_directory_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds 0 .model files"):
        load_tokenizer(tmp_path, 48)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=300 is too small"):
        train_small_tokenizer(["open the drawer"], vocab_size=300)
    with pytest.raises(ValueError, match="without texts"):
        train_small_tokenizer([" "])
