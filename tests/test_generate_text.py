"""The choice of text: sampling, beams against exhaustive search, both against transformers."""

from __future__ import annotations

import itertools

import pytest
import torch

import mmi_megatron  # noqa: F401  prepares the platform before transformers is imported
from mmi_megatron.config import LanguageConfig, MMFSConfig
from mmi_megatron.generate.text import TextOptions, beam_search, next_token, write
from mmi_megatron.model.language_model import Beams, Cache, LanguageModel, Visibility

V, STOP, LONGEST = 5, 0, 5


def table(seed):
    """Logits after every text of a toy language; the state of a text is the text itself."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[tuple, torch.Tensor] = {}

    def logits(text):
        if text not in made:
            made[text] = torch.randn(V, generator=generator, dtype=torch.float64)
        return made[text]

    def step(states, tokens):
        after = [(*state, token) for state, token in zip(states, tokens, strict=True)]
        return torch.stack([logits(text) for text in after]), after

    return logits, step


def exhaustive(logits, power, shortest):
    """Every text of the toy language, scored; the best first."""
    scored = []
    for length in range(1, LONGEST + 1):
        for text in itertools.product(range(V), repeat=length):
            ended = text[-1] == STOP
            if STOP in text[:-1] or (not ended and length < LONGEST) or (ended and length <= shortest):
                continue
            total = sum(float(logits(text[:i]).log_softmax(-1)[token]) for i, token in enumerate(text))
            scored.append((total / length**power, list(text)))
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shortest", [0, 2])
def test_beams_that_hold_everything_find_the_best_texts(power, shortest):
    for seed in range(3):
        logits, step = table(seed)
        options = TextOptions(beams=V**LONGEST, length_penalty=power, min_tokens=shortest, max_tokens=LONGEST)
        found = beam_search(logits(()), (), step, {STOP}, options)
        want = exhaustive(logits, power, shortest)
        assert [text.tokens for text in found] == [text for _, text in want]
        assert [text.score for text in found] == pytest.approx([score for score, _ in want])
        assert all(text.state == tuple(text.tokens[:-1]) for text in found)
        assert all(text.ended == (text.tokens[-1] == STOP) for text in found)


def test_narrow_beams_are_in_order_and_never_better_than_the_best():
    logits, step = table(7)
    found = beam_search(logits(()), (), step, {STOP}, TextOptions(beams=2, max_tokens=LONGEST))
    best = exhaustive(logits, 1.0, 0)
    scores = {tuple(text): score for score, text in best}
    assert len(found) == 2 and found[0].score >= found[1].score
    for text in found:
        assert text.score == pytest.approx(scores[tuple(text.tokens)])


def test_sampling_keeps_to_its_shares():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)

    def shares(count=4000, **options):
        drawn = [next_token(logits, TextOptions(**options), generator) for _ in range(count)]
        return torch.bincount(torch.tensor(drawn), minlength=V) / count

    torch.testing.assert_close(shares(), logits.softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits / 2).softmax(-1), atol=0.03, rtol=0)
    two = torch.tensor([2.0, 1.0]).softmax(-1)
    torch.testing.assert_close(shares(top_k=2)[:2], two, atol=0.03, rtol=0)
    # 0.64 alone is below 0.7, so the second one is needed as well; 0.64 holds 0.6 alone.
    torch.testing.assert_close(shares(top_p=0.7)[:2], two, atol=0.03, rtol=0)
    assert shares(top_p=0.6)[0] == 1 and shares(temperature=0.0)[0] == 1 and shares(top_k=1)[0] == 1


def test_a_seed_fixes_the_text_and_min_tokens_holds_off_the_end():
    logits, step = table(3)

    def text(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return write(logits(()), (), step, {STOP}, TextOptions(**options), generator)

    assert text(1, max_tokens=40).tokens == text(1, max_tokens=40).tokens
    assert len({tuple(text(seed, max_tokens=40).tokens) for seed in range(8)}) > 1
    for seed in range(20):
        long = text(seed, min_tokens=4, max_tokens=6)
        assert STOP not in long.tokens[:4] and 5 <= len(long.tokens) <= 6
        assert long.ended == (long.tokens[-1] == STOP) and long.state == tuple(long.tokens[:-1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"beams": 0},
        {"max_tokens": 0},
        {"top_k": -1},
        {"min_tokens": 300},
    ],
)
def test_options_that_make_no_sense_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TextOptions(**wrong)


@pytest.fixture(scope="module")
def llamas():
    """Our language model and transformers' with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LanguageConfig(
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn=48,
        vocabulary=23,
        vocabulary_multiple=23,
        mmfs=MMFSConfig(kind="none"),
        frozen=False,
        train_image_tokens=False,
    )
    torch.manual_seed(0)
    ours = LanguageModel(config, 0, (), boi=21, image=22).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.6)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    theirs = theirs.double().eval()
    state = {("" if n.startswith("lm_head") else "model.") + n: p for n, p in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return ours, theirs


def reader(model):
    """A step of our model; the state is (position, cache)."""

    def sees(positions):
        nothing = torch.zeros(len(positions), 2, dtype=torch.int32)
        return Visibility(torch.tensor(positions), list(range(len(positions) + 1)), nothing)

    @torch.no_grad()
    def step(states, tokens):
        caches = [cache.clone() for _, cache in states]
        hidden = model(model.embed(torch.tensor(tokens)), sees([at for at, _ in states]), None, Beams(caches))
        return model.logits(hidden), [(at + 1, cache) for (at, _), cache in zip(states, caches, strict=True)]

    @torch.no_grad()
    def start(prompt):
        cache, count = Cache(), len(prompt)
        nothing = torch.zeros(count, 2, dtype=torch.int32)
        at = Visibility(torch.arange(count), [0, count], nothing)
        hidden = model(model.embed(torch.tensor(prompt)), at, None, cache)
        return model.logits(hidden[-1:])[0], (count, cache)

    return start, step


@pytest.mark.parametrize(
    "settings", [(1, 1.0, 0), (3, 0.0, 0), (3, 1.0, 0), (4, 1.0, 5), (5, -0.5, 3), (2, 2.0, 0)]
)
def test_texts_are_those_of_transformers(llamas, settings):
    ours, theirs = llamas
    beams, power, shortest = settings
    start, step = reader(ours)
    options = TextOptions(
        temperature=0.0, beams=beams, length_penalty=power, min_tokens=shortest, max_tokens=12
    )
    ended = 0
    for seed in range(4):
        prompt = torch.randint(3, 21, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        logits, state = start(prompt)
        text = write(logits, state, step, {2}, options, torch.Generator())
        want = theirs.generate(
            torch.tensor([prompt]),
            do_sample=False,
            num_beams=beams,
            length_penalty=power,
            max_new_tokens=12,
            min_new_tokens=shortest,
        )[0, 6:].tolist()
        assert text.tokens == want
        ended += text.ended
    assert beams == 1 or ended, "no text ended, so ends are not tested"
