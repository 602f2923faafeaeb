"""CPython's documentation is real text everywhere; what is held out is in no training text."""

from pydoc_data.topics import topics as texts

from longctx.data.pydoc import topics


def test_every_topic_is_trained_on_or_held_out():
    train, test = ([record for record, _ in topics(split).read(None)] for split in ("train", "test"))
    assert sorted(record.text for record in [*train, *test]) == sorted(texts.values())
    assert len(test) == len(texts) // 10
    assert {record.where for record in train}.isdisjoint(record.where for record in test)


def test_reading_goes_on_where_it_stood():
    each = list(topics("train").read(None))
    _, behind = each[4]
    assert list(topics("train").read(behind)) == each[5:]
