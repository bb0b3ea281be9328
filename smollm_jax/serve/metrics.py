"""What /metrics reports, under vLLM's names where the meaning is the same, so that its dashboards work."""

import time
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from smollm_jax.generation.slots import SlotEngine

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)  # seconds
NEXT_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REQUEST = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)
COUNTERS = (
    ("vllm:prompt_tokens", "Prompt tokens of answered texts."),
    ("vllm:generation_tokens", "Generated tokens."),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache."),
    ("vllm:prefix_cache_hits", "Prompt tokens found there."),
)
HISTOGRAMS = (  # with their buckets in seconds
    ("vllm:time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN),
    ("vllm:inter_token_latency_seconds", "Between two tokens of a text.", NEXT_TOKEN),
    ("vllm:e2e_request_latency_seconds", "From the request to its last token.", REQUEST),
)


class Metrics:
    """The counters of one server, each with the name of a model as a label."""

    def __init__(self, models: Mapping[str, SlotEngine]):
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, read: Callable[[SlotEngine], float]) -> None:
            metric = Gauge(name, text, ["model_name"], registry=self.registry)
            for model, slots in models.items():
                metric.labels(model).set_function(lambda slots=slots: read(slots))

        gauge("vllm:num_requests_running", "Texts that are generated now.", lambda slots: slots.running)
        gauge("vllm:num_requests_waiting", "Texts that wait for a slot.", lambda slots: slots.waiting)
        gauge(
            "vllm:kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.", lambda slots: slots.cache_usage
        )
        success = Counter(
            "vllm:request_success", "Finished texts.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._refused = Counter("smollm:requests_refused", "Refused requests.", ["status"], registry=self.registry)
        counters = [Counter(*row, ["model_name"], registry=self.registry) for row in COUNTERS]
        histograms = [
            Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
            for name, text, buckets in HISTOGRAMS
        ]
        self._models = {model: ModelMetrics(model, counters, histograms, success) for model in models}

    def of_model(self, name: str) -> "ModelMetrics":
        """The counters of one model."""
        return self._models[name]

    def refused(self, status: int) -> None:
        """Counts a request that was answered with an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """The report in Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The counters of one model, in the order of `COUNTERS` and `HISTOGRAMS`."""

    def __init__(self, model: str, counters: Sequence[Counter], histograms: Sequence[Histogram], success: Counter):
        by_model = [counter.labels(model) for counter in counters]
        self.prompt_tokens, self.generation_tokens, self.prefix_queries, self.prefix_hits = by_model
        self.first_token, self.next_token, self.request = (histogram.labels(model) for histogram in histograms)
        self._model, self._success = model, success

    def finished(self, reason: str) -> None:
        """Counts a finished text."""
        self._success.labels(self._model, reason).inc()


class Stopwatch:
    """The times of one text's tokens."""

    def __init__(self, metrics: ModelMetrics):
        self._metrics, self._began = metrics, time.monotonic()
        self._last = 0.0

    def tokens(self, count: int) -> None:
        """Notes that `count` tokens arrived together."""
        now = time.monotonic()
        if not self._last:
            self._metrics.first_token.observe(now - self._began)
            count -= 1
        for _ in range(count):
            self._metrics.next_token.observe((now - self._last) / count)
        self._last = now

    def end(self) -> None:
        """Notes that the text has ended."""
        self._metrics.request.observe(time.monotonic() - self._began)
