"""The server's front end as the client sees it: overhead on TTFT, and pauses.

The front end is one Python process next to the engine. It pauses when an adapter is used for the
first time (vLLM 0.8.5 then loads the adapter's tokenizer), and when somebody reads its metrics:
0.8.5 keeps a label set for every distinct pair of sets of running and waiting adapters (named in
the order of their first use, so order tells nothing apart) and writes all of them at each read. The
reference measurement read them every two seconds, so it slowed itself down.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from adapter_twin.laws.estimator import Estimator, NotBelow0
from adapter_twin.workload.strict import Count

UNLIMITED = np.iinfo(np.int64).max
"""This many requests may be in flight where no load generator limits them."""

Floats = NDArray[np.float64]


class FrontEndLaw(Estimator):
    """Overhead on TTFT, and the pause of a first use.

    Attributes
    ----------
    overhead_ms_, overhead_per_running_ms_ : float
        From the engine's first token to the client's, plus the way in.
    first_use_ms_ : float
        See `adapter_twin.calibrate.client_side.fit_first_use`.
    interval_ : dict
        95 % intervals, by attribute.
    """

    overhead_ms_: NotBelow0
    overhead_per_running_ms_: NotBelow0
    first_use_ms_: NotBelow0
    interval_: dict[str, list[float]]

    def __init__(self) -> None:
        self.overhead_ms_ = self.overhead_per_running_ms_ = self.first_use_ms_ = 0.0
        self.interval_ = {}

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
        names = ("overhead_ms_", "overhead_per_running_ms_")
        self.interval_ |= dict(zip(names, fit.conf_int().tolist(), strict=True))
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
    scrape_ms_, scrape_ms_per_label_, scrape_ms_per_name_, scrape_ms_per_label_running_ : float
        Duration of a read of the metrics: a constant, per label set, per adapter name in them, and,
        as measured, per label set and running request.
    scrape_pause_share_ : float
        The server pauses for this share of a read; in the rest, the client takes the page in.
    """

    arrivals: Literal["poisson", "agullo2025"]
    scrape_period_s: Annotated[float, Field(ge=0.01, le=1e9)]
    in_flight_cap: Count
    scrape_ms_: NotBelow0
    scrape_ms_per_label_: NotBelow0
    scrape_ms_per_name_: NotBelow0
    scrape_ms_per_label_running_: NotBelow0
    scrape_pause_share_: Annotated[float, Field(ge=0, le=1)]

    def __init__(
        self,
        arrivals: Literal["poisson", "agullo2025"] = "agullo2025",
        scrape_period_s: float = 2.0,
        in_flight_cap: int = 25_500,
    ) -> None:
        self.arrivals = arrivals
        self.scrape_period_s = scrape_period_s
        self.in_flight_cap = in_flight_cap
        self.scrape_ms_ = self.scrape_ms_per_label_ = self.scrape_ms_per_name_ = 0.0
        self.scrape_ms_per_label_running_, self.scrape_pause_share_ = 0.0, 1.0

    def fit(
        self, labels: Floats, names: Floats, running: Floats, scrape_ms: Floats
    ) -> MeasurementLaw:
        """Fit to measured durations of reads, one to a row.

        Parameters
        ----------
        labels, names, running : float64, shape (reads,)
            Label sets, adapter names in them, and running requests, as simulated.
        scrape_ms : float64, shape (reads,)
        """
        from scipy.optimize import nnls

        design = np.column_stack([np.ones(len(labels)), labels, names, labels * running])
        weight = 1 / (scrape_ms + 10)
        for _ in range(3):
            values = nnls(design * weight[:, None], scrape_ms * weight)[0]
            error = np.abs(design @ values - scrape_ms) / (scrape_ms + 10)
            robust = np.sqrt(np.minimum(1, 2 * np.median(error) / np.maximum(error, 1e-9)))
            weight = robust / (scrape_ms + 10)
        self.scrape_ms_, self.scrape_ms_per_label_, self.scrape_ms_per_name_ = values[:3].tolist()
        self.scrape_ms_per_label_running_ = float(values[3])
        return self
