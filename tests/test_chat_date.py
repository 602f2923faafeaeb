"""A chat template that writes today's date gets a fixed day."""

import pytest

from longctx.chat_date import with_date, writes_date


@pytest.mark.parametrize(
    ("template", "dated"),
    [
        ("{{ strftime_now('%d %b %Y') }}", '{{ "26 Jul 2024" }}'),
        ('{{ strftime_now( "%y" ) }}', '{{ "24" }}'),
        ("{{ strftime_now('') }}", '{{ "" }}'),
        (
            "{% if strftime_now is defined %}{{ strftime_now('%B') }}{% endif %}",
            '{% if strftime_now is defined %}{{ "July" }}{% endif %}',
        ),
    ],
)
def test_calls_become_the_day(template, dated):
    assert writes_date(template)
    assert with_date(template, "2024-07-26") == dated
    assert not writes_date(dated)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages }}", "writes no date .* use model.date=null"),
        ("{% if strftime_now is not defined %}{% endif %}", "writes no date"),
        (None, "one chat template"),
        ({"default": "{{ strftime_now('%d') }}"}, "one chat template: set model.chat_template"),
        ("{{ strftime_now(messages) }}", "set model.chat_template to a copy"),
        ("{{ strftime_now('%d' ~ ' %b') }}", "set model.chat_template to a copy"),
        ("{{ strftime_now('%d\\n%b') }}", "set model.chat_template to a copy"),
        ("{% set now = strftime_now %}{{ now('%d') }}", "set model.chat_template to a copy"),
    ],
)
def test_templates_that_cannot_be_dated_are_refused(template, words):
    with pytest.raises(ValueError, match=f"model.date=2024-07-26.*{words}"):
        with_date(template, "2024-07-26")
