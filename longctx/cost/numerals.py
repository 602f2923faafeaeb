"""Numbers of times and sizes in text for the user."""


def three_digits(value: float) -> str:
    """Return ``value`` with three digits, or as a whole number with all its digits from 1,000 on.

    Only values below 0.0001 are written with a power of ten.
    """
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
