"""Today's date in chat templates: transformers gives them a function strftime_now."""

import datetime
import re


def with_date(template: object, date: str) -> str:
    """Return the chat ``template`` with ``date`` (ISO, such as 2026-11-30) in place of its calls of strftime_now.

    Raises ValueError unless it is one template that calls strftime_now, always with a format.
    """
    day = datetime.date.fromisoformat(date)
    if not isinstance(template, str):
        raise ValueError(f"model.date={date} is for models with one chat template: set model.chat_template")
    if not writes_date(template):
        raise ValueError(
            f"model.date={date}: the model's chat template writes no date (strftime_now); use model.date=null"
        )
    call = r"\bstrftime_now\s*\(\s*(?:'([^'\"\\]*)'|\"([^'\"\\]*)\")\s*\)"
    dated = re.sub(call, lambda match: f'"{day.strftime(match[1] or match[2] or "")}"', template)
    if writes_date(dated):
        raise ValueError(
            f"model.date={date}: the model's chat template does not give strftime_now a plain text, such as "
            "'%d %b %Y'; set model.chat_template to a copy with a fixed date"
        )
    return dated


def writes_date(template: object) -> bool:
    """Return True if a chat ``template`` uses transformers' strftime_now, and does not only ask if it is defined."""
    return "strftime_now" in re.sub(r"\bstrftime_now\s+is\s+(not\s+)?defined\b", "", str(template))
