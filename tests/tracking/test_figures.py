from __future__ import annotations

import io
import math

import numpy as np

from llama_ray.tracking.figures import loss_curve


def test_short_curves_show_every_point_in_order() -> None:
    axes = loss_curve({20: 3.0, 10: 4.0}, {15: 3.5}, x_label="tokens").axes[0]
    train, validation = axes.get_lines()
    assert train.get_xydata().tolist() == [[10, 4], [20, 3]]
    assert validation.get_xydata().tolist() == [[15, 3.5]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "loss (nats per token)")


def test_long_curves_add_a_running_mean_that_ignores_gaps() -> None:
    losses = {step: 2.0 + (-1) ** step for step in range(1000)} | {500: math.nan, 501: math.inf}
    _, mean = loss_curve(losses, {}).axes[0].get_lines()
    values = np.asarray(mean.get_ydata())
    assert len(values) == 998
    np.testing.assert_allclose(values[20:], 2.0, atol=0.11)


def test_a_run_without_points_gives_an_empty_figure() -> None:
    file = io.BytesIO()
    loss_curve({}, {}).savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
