"""`LeastSquares` compared with torch.linalg.lstsq in float64, where the ridge is given as additional rows."""

import torch

from longctx.spd.least_squares import LeastSquares
from tests.oracle import assert_close

WIDTH, ROWS, RIDGE = 13, 97, 0.07


def test_matrix_is_the_least_squares_solution_for_any_split_of_rows() -> None:
    draw = torch.Generator().manual_seed(43)
    seen = torch.randn(ROWS, WIDTH, generator=draw) * torch.rand(WIDTH, generator=draw)
    wanted = seen @ torch.randn(WIDTH, WIDTH, generator=draw) + torch.randn(ROWS, WIDTH, generator=draw)
    weights = 2 * torch.rand(ROWS, generator=draw)
    regression = LeastSquares(WIDTH, seen.device)
    for rows in (slice(31), slice(31, 32), slice(32, None)):
        regression.update(seen[rows], wanted[rows], weights[rows])
    seen, wanted = (rows.double() * weights.double().sqrt()[:, None] for rows in (seen, wanted))
    penalty = RIDGE * seen.square().mean(0).sum() * ROWS / WIDTH
    ridge_rows = penalty.sqrt() * torch.eye(WIDTH, dtype=torch.double)
    both = [torch.cat([rows, ridge_rows]) for rows in (seen, wanted)]
    assert_close(regression.matrix(RIDGE), torch.linalg.lstsq(*both).solution.T, 2e-6)


def test_direction_that_is_never_seen_stays_unchanged() -> None:
    seen = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(47))
    seen[:, 5] = 0
    regression = LeastSquares(WIDTH, seen.device)
    regression.update(seen, 3 * seen, torch.ones(ROWS))
    column = regression.matrix(RIDGE)[:, 5]
    assert_close(column, torch.eye(WIDTH, dtype=torch.double)[5], 1e-6)
