"""What /metrics reports, under vLLM's names where the meaning is the same, so that its dashboards work."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from smollm_jax.generation.slots import SlotEngine

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)  # seconds
NEXT_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REQUEST = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)


class Metrics:
    """The counters of one server."""

    def __init__(self, slots: SlotEngine, model: str):
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, read) -> None:
            Gauge(name, text, ["model_name"], registry=self.registry).labels(model).set_function(read)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry).labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(model)

        gauge("vllm:num_requests_running", "Texts that are generated now.", lambda: slots.running)
        gauge("vllm:num_requests_waiting", "Texts that wait for a slot.", lambda: slots.waiting)
        gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.", lambda: slots.cache_usage)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of answered texts.")
        self.generation_tokens = counter("vllm:generation_tokens", "Generated tokens.")
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found there.")
        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN
        )
        self.next_token = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a text.", NEXT_TOKEN)
        self.request = histogram("vllm:e2e_request_latency_seconds", "From the request to its last token.", REQUEST)
        self._success = Counter(
            "vllm:request_success", "Finished texts.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._refused = Counter("smollm:requests_refused", "Refused requests.", ["status"], registry=self.registry)
        self._model = model

    def finished(self, reason: str) -> None:
        """Counts a finished text."""
        self._success.labels(self._model, reason).inc()

    def refused(self, status: int) -> None:
        """Counts a request that was answered with an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """The report in Prometheus' text format."""
        return generate_latest(self.registry)


class Stopwatch:
    """The times of one text's tokens."""

    def __init__(self, metrics: Metrics):
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
