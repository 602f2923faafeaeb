"""The linear guess against least squares by orthogonal factors, in float64, with the ridge as rows of their own."""

import torch

from longctx.spd.least_squares import LeastSquares
from tests.oracle import assert_close

WIDTH, ROWS, RIDGE = 13, 97, 0.07


def test_it_is_the_least_squares_solution_whatever_the_rows_come_in() -> None:
    draw = torch.Generator().manual_seed(43)
    seen = torch.randn(ROWS, WIDTH, generator=draw) * torch.rand(WIDTH, generator=draw)
    wanted = seen @ torch.randn(WIDTH, WIDTH, generator=draw) + torch.randn(ROWS, WIDTH, generator=draw)
    guess = LeastSquares(WIDTH, seen.device)
    for rows in (slice(31), slice(31, 32), slice(32, None)):
        guess.update(seen[rows], wanted[rows])
    stay = (RIDGE * seen.double().square().mean(0).sum() * ROWS / WIDTH).sqrt() * torch.eye(WIDTH, dtype=torch.double)
    both = [torch.cat([rows.double(), stay]) for rows in (seen, wanted)]
    assert_close(guess.matrix(RIDGE), torch.linalg.lstsq(*both).solution.T, 2e-6)


def test_what_is_never_seen_stays_as_it_is() -> None:
    seen = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(47))
    seen[:, 5] = 0
    guess = LeastSquares(WIDTH, seen.device)
    guess.update(seen, 3 * seen)
    column = guess.matrix(RIDGE)[:, 5]
    assert_close(column, torch.eye(WIDTH, dtype=torch.double)[5], 1e-6)
