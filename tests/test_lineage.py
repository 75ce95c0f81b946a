"""Which versions a life of the trainer descends from."""

from publisher.lineage import Lineage
from shared.versions import Version


def test_a_first_life_descends_from_itself_alone():
    assert Lineage(1).includes(Version(1, 9))
    assert not Lineage(1).includes(Version(2, 0))


def test_a_resumed_life_descends_from_the_numbers_up_to_where_it_resumed():
    lineage = Lineage(1).resumed(2, number=5)
    assert lineage.includes(Version(1, 5))
    assert not lineage.includes(Version(1, 6))
    assert lineage.includes(Version(2, 6))


def test_versions_that_were_thrown_away_stay_so_in_the_third_life():
    lineage = Lineage(1).resumed(2, number=5).resumed(3, number=7)
    assert [lineage.includes(v) for v in (Version(1, 5), Version(1, 6), Version(2, 7), Version(2, 8))] == [
        True,
        False,
        True,
        False,
    ]


def test_going_further_back_than_the_last_life_began_cuts_the_lives_before_too():
    lineage = Lineage(1).resumed(2, number=5).resumed(3, number=3)
    assert not lineage.includes(Version(1, 4))


def test_an_epoch_that_was_claimed_and_never_checkpointed_is_skipped():
    lineage = Lineage(1).resumed(4, number=5)
    assert not lineage.includes(Version(2, 5))
    assert not lineage.includes(Version(3, 5))


def test_lineage_survives_json():
    lineage = Lineage(1).resumed(2, number=5).resumed(3, number=7)
    assert Lineage.from_json(lineage.to_json()) == lineage
