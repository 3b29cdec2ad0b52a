"""rows.py against a slow reading of the rule, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import IGNORED
from data_pipeline.rows import SpecialTokens, describe_stream, predicted
from mmi_megatron.model.rows import describe_rows

SPECIAL = SpecialTokens(bos=1, eos=2, pad=3, boi=4, image=5)
TOKENS = st.lists(st.sampled_from([1, 1, 2, 3, 4, 4, 5, 6, 7, 8]), min_size=1, max_size=24)


def slow_row(tokens, pair, release, max_images, max_references):
    """One row, by definition."""
    start_of = []
    for t, token in enumerate(tokens):
        start_of.append(t if token == SPECIAL.bos or t == 0 else start_of[-1])
    bois = [t for t, token in enumerate(tokens) if token == SPECIAL.boi]
    visible, labels = [], []
    for t in range(len(tokens)):
        seen = [i for i, b in enumerate(bois) if start_of[t] <= b and b + 1 <= t]
        visible.append(set(seen[-max_images:] if max_images else seen))
        label = tokens[t + 1] if t + 1 < len(tokens) else None
        first_image = label == SPECIAL.boi and tokens[t] == SPECIAL.bos
        if label in (None, SPECIAL.pad, SPECIAL.image, SPECIAL.bos) or first_image:
            label = IGNORED
        elif pair[t + 1] if isinstance(pair, list) else pair:
            own = [b for b in bois if start_of[b] == start_of[t + 1]]
            if own and t + 1 < own[0]:
                label = IGNORED
        labels.append(label)
    references, loss = [], []
    for i, b in enumerate(bois):
        earlier = [j for j in range(i) if start_of[bois[j]] == start_of[b]]
        limit = 1 if release else max_references
        references.append(set(earlier[-limit:] if limit else earlier))
        context = tokens[start_of[b] : b + 1]
        loss.append(context not in ([SPECIAL.bos, SPECIAL.boi], [SPECIAL.boi]))
    position = [t if release else t - start_of[t] for t in range(len(tokens))]
    starts = sorted(set(start_of))
    return {
        "document": [starts.index(s) for s in start_of],
        "position": position,
        "visible": visible,
        "labels": labels,
        "references": references,
        "loss": loss,
        "context_start": [start_of[b] for b in bois],
        "boi": bois,
    }


def interval(pair):
    return set(range(pair[0], pair[1]))


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(TOKENS, min_size=1, max_size=4),
    pair=st.booleans(),
    release=st.booleans(),
    max_images=st.sampled_from([None, 1, 2]),
    max_references=st.sampled_from([None, 1, 2]),
)
def test_matches_the_slow_rule(rows, pair, release, max_images, max_references):
    stream = np.concatenate([np.array(r) for r in rows])
    starts = np.cumsum([0, *map(len, rows)])
    got = describe_stream(
        stream,
        starts,
        SPECIAL,
        pair_source=pair,
        release=release,
        max_images=max_images,
        max_references=max_references,
    )
    labels, loss = predicted(stream, starts, SPECIAL, pair_source=pair)
    image = 0
    for number, row in enumerate(rows):
        want = slow_row(row, pair, release, max_images, max_references)
        at = slice(starts[number], starts[number + 1])
        assert got.document[at].tolist() == want["document"]
        assert got.position[at].tolist() == want["position"]
        assert got.labels[at].tolist() == labels[at].tolist() == want["labels"]
        assert [interval(v) for v in got.visible[at]] == want["visible"]
        count = len(want["boi"])
        mine = slice(image, image + count)
        assert got.image_row[mine].tolist() == [number] * count
        assert got.image_offset[number] == image
        assert got.image_boi[mine].tolist() == want["boi"]
        assert got.context_start[mine].tolist() == want["context_start"]
        assert [interval(r) for r in got.references[mine]] == want["references"]
        assert got.image_loss[mine].tolist() == loss[mine].tolist() == want["loss"]
        image += count
    assert image == len(got.image_boi)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12).flatmap(
        lambda length: st.lists(
            st.lists(
                st.tuples(st.sampled_from([1, 1, 2, 3, 4, 4, 5, 6]), st.booleans()),
                min_size=length,
                max_size=length,
            ),
            min_size=1,
            max_size=3,
        )
    ),
    st.booleans(),
)
def test_tensors_follow_the_slow_rule_with_a_source_for_every_token(batch, release):
    tokens = torch.tensor([[token for token, _ in row] for row in batch])
    pairs = [[pair for _, pair in row] for row in batch]
    got = describe_rows(
        tokens, bos=1, eos=2, pad=3, boi=4, image_token=5, pair_source=torch.tensor(pairs), release=release
    )
    slow = [
        slow_row(row.tolist(), pair, release, None, None) for row, pair in zip(tokens, pairs, strict=True)
    ]
    for name in ("document", "position", "labels"):
        assert getattr(got, name).tolist() == [row[name] for row in slow]
    spans = torch.stack([got.visible_first, got.visible_last], -1).tolist()
    assert [[interval(span) for span in row] for row in spans] == [row["visible"] for row in slow]

    def joined(name):
        return [value for row in slow for value in row[name]]

    assert got.image_row.tolist() == [number for number, row in enumerate(slow) for _ in row["boi"]]
    assert got.image_boi.tolist() == joined("boi") and got.context_start.tolist() == joined("context_start")
    references = zip(got.reference_first.tolist(), got.reference_last.tolist(), strict=True)
    assert [interval(span) for span in references] == joined("references")
    assert got.image_loss.tolist() == joined("loss") and got.image_loss.dtype == torch.bool
    assert all(getattr(got, n).dtype == torch.int64 for n in ("labels", "visible_first", "reference_last"))


def test_a_document_written_out():
    #         0  1  2  3  4  5  6  7  8  9
    tokens = [1, 6, 4, 5, 5, 7, 4, 5, 5, 2, 1, 4, 5, 5, 8, 2, 3, 3]
    rows = describe_rows(torch.tensor([tokens]), bos=1, eos=2, pad=3, boi=4, image_token=5)
    assert rows.labels[0].tolist() == [
        6, 4, -100, -100, 7, 4, -100, -100, 2, -100, -100, -100, -100, 8, 2, -100, -100, -100,
    ]  # fmt: skip
    assert rows.visible_first[0].tolist() == [0] * 10 + [2] * 8
    assert rows.visible_last[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert rows.image_loss.tolist() == [True, True, False]
    assert rows.reference_first.tolist() == [0, 0, 2] and rows.reference_last.tolist() == [0, 1, 2]


def test_pair_source_may_differ_by_token():
    tokens = torch.tensor([[1, 6, 4, 5, 2, 1, 6, 4, 5, 2]])
    pair = torch.tensor([[True] * 5 + [False] * 5])
    rows = describe_rows(tokens, bos=1, eos=2, pad=3, boi=4, image_token=5, pair_source=pair)
    assert rows.labels[0].tolist() == [-100, 4, -100, 2, -100, 6, 4, -100, 2, -100]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"pair_source: expected a bool or one a token, \(1, 3\)"):
        describe_rows(
            torch.ones(1, 3), bos=1, eos=2, pad=3, boi=4, image_token=5, pair_source=torch.ones(3) > 0
        )
    with pytest.raises(ValueError, match="one axis"):
        describe_stream(np.zeros((2, 3), int), np.array([0, 3]), SPECIAL)
    with pytest.raises(ValueError, match="row_starts"):
        describe_stream(np.zeros(4, int), np.array([0, 3]), SPECIAL)
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        describe_rows(torch.zeros(3, dtype=torch.long), bos=1, eos=2, pad=3, boi=4, image_token=5)
