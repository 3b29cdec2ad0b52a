"""The tokenizer: round trips, structure that text cannot forge, foreign files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from data_pipeline.errors import DataError
from data_pipeline.tokens import SPECIAL, load_tokenizer, train_tokenizer

TRAINED = train_tokenizer(["some words and some more words"] * 3, 300)
STRUCTURE = {
    TRAINED.special.bos,
    TRAINED.special.eos,
    TRAINED.special.pad,
    TRAINED.special.boi,
    TRAINED.special.image,
}


def llama(vocabulary: int = 32000) -> Backend:
    """A tokenizer.json made as LLaMA's: BPE with bytes, <unk> 0, <s> 1, </s> 2."""
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a"]
    names += [f"word{i}" for i in range(vocabulary - len(names))]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Backend(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.sampled_from([f"a{token}b" for token in SPECIAL]))
def test_any_text_comes_back_and_holds_no_structure(text):
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert not STRUCTURE & set(ids)


def test_decoding_leaves_structure_out():
    ids = [TRAINED.special.bos, *TRAINED.encode("some"), TRAINED.special.boi, TRAINED.special.image]
    assert TRAINED.decode([*ids, *TRAINED.encode(" words"), TRAINED.special.eos]) == "some words"


def test_saving_and_loading_changes_nothing(tmp_path):
    TRAINED.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == TRAINED.fingerprint
        assert (loaded.special, loaded.size) == (TRAINED.special, TRAINED.size)
        assert loaded.encode("some <s> words") == TRAINED.encode("some <s> words")
    other = train_tokenizer(["quite other text"] * 3, 300)
    assert other.fingerprint != TRAINED.fingerprint


def test_llama_gains_the_image_tokens_of_the_release(tmp_path):
    llama().save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.size == 32002
    assert (loaded.special.bos, loaded.special.eos) == (1, 2)
    assert (loaded.special.boi, loaded.special.image) == (32000, 32001)
    assert loaded.special.pad == 0
    text = "a é <s></s><unk><|image|>"
    ids = loaded.encode(text)
    assert not {0, 1, 2, 32000, 32001} & set(ids)
    assert loaded.decode(ids).strip() == text


def test_a_padding_token_is_appended_where_unknown_may_occur(tmp_path):
    names = ["<unk>", "<s>", "</s>", "a"]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.special.pad == 6
    assert loaded.encode("a?") == [3, 0]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0", "model": 3}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json.*not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
    Backend(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no '<s>'"):
        load_tokenizer(tmp_path)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="mmi data tokenizer"):
        load_tokenizer(tmp_path / "none.json")


def test_too_small_a_vocabulary_is_an_error():
    with pytest.raises(DataError, match="at least 261"):
        train_tokenizer(["x"], 260)


def test_stored_padding_and_truncation_are_ignored(tmp_path):
    TRAINED.save(tmp_path / "tokenizer.json")
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    value["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("some words and more") == TRAINED.encode("some words and more")
