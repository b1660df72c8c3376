"""Who is a canary, of which kind and dose; by itself, without a corpus."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED
from memtrain.data.canaries import Canary
from memtrain.data.groups import Groups, draw_groups
from memtrain.data.order import EpochOrder
from memtrain.data.pictures import Pictures

COUNTS = (13, 0, 20, 1, 16)  # 50 samples


def epoch_of(order) -> Counter:
    return Counter(row for window in order.windows(0) for row in order.positions(window).tolist())


@given(
    doses=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    count=st.integers(1, 8),
    sacrificed=st.integers(0, 2),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_doses_are_dealt_in_turn_and_met_exactly_in_an_epoch(doses, count, sacrificed, seed):
    sacrificed = min(sacrificed, count)
    groups = draw_groups(COUNTS, seed, count, 5, repeats=doses, sacrificed=sacrificed)
    dealt = [doses[number % len(doses)] for number in range(count)]
    own = groups.repeats_of(groups.planted).tolist()
    assert sorted(own) == sorted(dealt) and own == groups.doses.tolist()
    assert own[:sacrificed] == sorted(dealt, reverse=True)[:sacrificed]
    assert sacrificed or own == dealt
    seen = epoch_of(EpochOrder(COUNTS, groups, seed))
    known = dict(zip(groups.planted.tolist(), own, strict=True)) | dict.fromkeys(groups.reference.tolist(), 0)
    assert seen == Counter({position: known.get(position, 1) for position in range(50)})
    alike = draw_groups(COUNTS, seed, count, 5, repeats=3, sacrificed=sacrificed)  # who they are is another matter
    assert alike.planted.tolist() == groups.planted.tolist() and alike.reference.tolist() == groups.reference.tolist()


def test_each_position_has_the_group_number_kind_and_dose_of_its_canary():
    listed = Canary(7, "retrieval", np.array([4, 9, 2]), 3, is_listed=True)
    planted = Canary(1, "planted", np.array([6]), 20, is_planted=True)
    pictures = Pictures.labelled(np.array([2, 4, 9]), np.array([0, 0, 1]))  # what the hashes say is another matter
    groups = Groups(12, (planted, listed), 1, np.array([11, 0]), pictures)
    everyone = np.arange(12)
    assert groups.of(everyone).tolist() == [
        {6: SACRIFICED, 4: CANARY, 9: CANARY, 2: CANARY, 11: REFERENCE, 0: REFERENCE}.get(n, TRAINED) for n in range(12)
    ]
    assert groups.canary_of(everyone).tolist() == [{6: 1, 4: 7, 9: 7, 2: 7}.get(n, -1) for n in range(12)]
    assert groups.repeats_of(everyone).tolist() == [{6: 20, 4: 3, 9: 3, 2: 3}.get(n, 0) for n in range(12)]
    kinds = {6: "planted", 4: "retrieval", 9: "retrieval", 2: "retrieval"}
    assert groups.kind_of(everyone) == [kinds.get(n, "") for n in range(12)]
    assert groups.one_each(groups.canary).tolist() == [4] and groups.planted.tolist() == [6]
    assert groups.looked_at(groups.canary, 6).tolist() == [[4, 4, 9, 9, 2, 2]]
    assert groups.looked_at(np.array([9, 2, 6]), 2).tolist() == [[4, 9], [6, 6]]
    assert groups.looked_at(groups.reference[:0], 3).shape == (0, 3)
    assert Groups(12).canary_of(everyone).tolist() == [-1] * 12 and Groups(12).kind_of(everyone[:1]) == [""]


@pytest.mark.parametrize("repeats", [2, [2, 5], None])
def test_one_picture_is_one_canary(repeats):
    pictures = Pictures.labelled(np.array([3, 5, 8, 1, 7]), np.array([0, 0, 0, 1, 1]))
    groups = draw_groups(COUNTS, 0, 2, 3, pictures=pictures, repeats=repeats, sacrificed=1)
    both = np.concatenate([groups.sacrificed, groups.canary])
    assert groups.canary_of(groups.one_each(both)).tolist() == [0, 1]
    assert set(groups.kind_of(both)) == {"duplicates" if repeats is None else "planted"}
    doses = {"None": [3, 2], "2": [2, 2], "[2, 5]": [5, 2]}[str(repeats)]
    assert groups.repeats_of(groups.one_each(both)).tolist() == doses
    assert groups.looked_at(both, 4).tolist() == [[first] * 4 for first in groups.one_each(both).tolist()]
