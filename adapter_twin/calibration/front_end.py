"""The server's front end as the client sees it: overhead on TTFT, and pauses.

The front end is one Python process next to the engine. It pauses when an adapter is used for the
first time (vLLM 0.8.5 then loads the adapter's tokenizer), and when somebody reads its metrics:
0.8.5 keeps a label set for every distinct pair of sets of running and waiting adapters (named in
the order of their first use, so order tells nothing apart) and writes all of them at each read. The
reference measurement read them every two seconds, so it slowed itself down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from adapter_twin.calibration.estimator import Estimator

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

FIRST_USE_WINDOW_S = 150.0
"""By then nearly all first uses of a run have happened."""

MANY_ADAPTERS = 100
PAUSED_GAP_S = 2.4
"""A sample that comes later than that met a pause: samples are 2 s apart."""


class FrontEndLaw(Estimator):
    """Overhead on TTFT, and the pause of a first use.

    Attributes
    ----------
    overhead_ms_, overhead_per_running_ms_ : float
        From the engine's first token to the client's, plus the way in.
    first_use_ms_ : float
    interval_ : dict
        95 % intervals, by attribute.
    """

    def __init__(self) -> None:
        self.overhead_ms_ = self.overhead_per_running_ms_ = self.first_use_ms_ = 0.0
        self.interval_: dict[str, list[float]] = {}

    def fit_first_use(self, runs: pd.DataFrame, series: pd.DataFrame) -> FrontEndLaw:
        """Fit the pause to the first seconds of runs with many adapters.

        They come faster than the front end can take them, so it pauses without a break, which
        shows as late samples, until all are in use.

        Parameters
        ----------
        runs : DataFrame
            Runs of one model; ``adapters_used``: adapters that get a request by then.
        series : DataFrame
            Their samples (table ``series``), taken 2 s apart where nothing pauses.
        """
        runs = runs[runs.adapters_used >= MANY_ADAPTERS]
        start = series[(series.t_s > -3) & (series.t_s < FIRST_USE_WINDOW_S)]
        gap_s = start.groupby("run_id", observed=True).t_s.diff()
        paused_s = gap_s.where(gap_s > PAUSED_GAP_S).groupby(start.run_id, observed=True).sum()
        pause_ms = 1e3 * paused_s.reindex(runs.run_id).to_numpy() / runs.adapters_used.to_numpy()
        self.first_use_ms_ = float(np.nanmedian(pause_ms))
        self.interval_ = {"first_use_ms_": np.nanpercentile(pause_ms, [2.5, 97.5]).tolist()}
        return self

    def fit_overhead(self, running: Floats, engine_ttft_ms: Floats, ttft_ms: Floats) -> FrontEndLaw:
        """Fit the overhead to what the engine alone leaves of measured median TTFTs.

        Parameters
        ----------
        running : float64, shape (runs,)
            Mean running requests.
        engine_ttft_ms, ttft_ms : float64, shape (runs,)
            Median TTFT without overhead, and measured.
        """
        import statsmodels.api as sm

        design = sm.add_constant(running)
        fit = sm.RLM((ttft_ms - engine_ttft_ms) / ttft_ms, design / ttft_ms[:, None]).fit()
        self.overhead_ms_, self.overhead_per_running_ms_ = np.maximum(fit.params, 0).tolist()
        low_high = fit.conf_int()
        self.interval_ |= {
            "overhead_ms_": low_high[0].tolist(),
            "overhead_per_running_ms_": low_high[1].tolist(),
        }
        return self

    @property
    def overhead_s(self) -> Floats:
        """Constant, and per running request, in s."""
        return np.array([self.overhead_ms_, self.overhead_per_running_ms_]) / 1e3


class MeasurementLaw(Estimator):
    """What a measurement did to itself.

    Attributes
    ----------
    arrivals : str
        Process that its load generator drew Poisson arrivals by.
    scrape_period_s, in_flight_cap : float, int
        Of its client.
    scrape_ms_, scrape_ms_per_label_, scrape_ms_per_name_ : float
        Duration of a read of the metrics: a constant, per label set, per adapter name in them.
    """

    def __init__(
        self,
        arrivals: Literal["poisson", "agullo2025"] = "agullo2025",
        scrape_period_s: float = 2.0,
        in_flight_cap: int = 25_500,
    ) -> None:
        self.arrivals: Literal["poisson", "agullo2025"] = arrivals
        self.scrape_period_s = scrape_period_s
        self.in_flight_cap = in_flight_cap
        self.scrape_ms_ = self.scrape_ms_per_label_ = self.scrape_ms_per_name_ = 0.0

    def fit(self, labels: Floats, names: Floats, scrape_ms: Floats) -> MeasurementLaw:
        """Fit to measured durations of reads, given simulated numbers of label sets and names."""
        from scipy.optimize import nnls

        design = np.column_stack([np.ones(len(labels)), labels, names])
        weight = 1 / (scrape_ms + 10)
        for _ in range(3):
            values = nnls(design * weight[:, None], scrape_ms * weight)[0]
            error = np.abs(design @ values - scrape_ms) / (scrape_ms + 10)
            robust = np.sqrt(np.minimum(1, 2 * np.median(error) / np.maximum(error, 1e-9)))
            weight = robust / (scrape_ms + 10)
        self.scrape_ms_, self.scrape_ms_per_label_, self.scrape_ms_per_name_ = values.tolist()
        return self
