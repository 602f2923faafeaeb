"""CPython's documentation as a source; the train and test splits are disjoint."""

from pydoc_data.topics import topics as texts

from longctx.data.pydoc import topics


def test_every_topic_is_in_exactly_one_split():
    train, test = ([record for record, _ in topics(split).read(None)] for split in ("train", "test"))
    assert sorted(record.text for record in [*train, *test]) == sorted(texts.values())
    assert len(test) == len(texts) // 10
    assert {record.where for record in train}.isdisjoint(record.where for record in test)


def test_reading_resumes_at_a_position():
    each = list(topics("train").read(None))
    _, position = each[4]
    assert list(topics("train").read(position)) == each[5:]
