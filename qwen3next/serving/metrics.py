"""What the engine did and does, in Prometheus' text form."""

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from qwen3next.serving.engine import Engine


def metrics(engine: Engine) -> bytes:
    """Counters since the start, and numbers of this moment."""
    registry, store, counters = CollectorRegistry(), engine.store, engine.counters
    now = {
        "requests_waiting": (engine.queued, "requests that wait"),
        "requests_running": (engine.running, "requests whose prompt or text is under way"),
        "cache_bytes_reserved": (engine.reserved, "bytes that running requests have reserved"),
        "cache_bytes": (engine.max_memory, "bytes for the caches of all requests"),
        "prefix_bytes": (store.nbytes if store else 0, "bytes of prefixes kept in memory"),
        "prefix_states": (len(store) if store else 0, "states from which prompts can continue, on disk as well"),
    }
    for name, (value, help_text) in now.items():
        Gauge(f"qwen3next_{name}", help_text, registry=registry).set(value)
    totals = {
        "prompt_tokens": (counters.prompt_tokens, "prompt tokens that were run"),
        "cached_prompt_tokens": (counters.cached_tokens, "prompt tokens that came from the prefix store"),
        "generated_tokens": (counters.new_tokens, "tokens that were generated"),
        "steps": (counters.steps, "calls of the model after prompts"),
        "drafted_tokens": (counters.drafted, "tokens that were drafted"),
        "accepted_tokens": (counters.accepted, "drafted tokens that were kept"),
        "requests_refused": (counters.refused, "requests refused because the queue was full"),
    }
    families = [
        CounterMetricFamily(f"qwen3next_{name}", help_text, value=value) for name, (value, help_text) in totals.items()
    ]
    finished = CounterMetricFamily("qwen3next_requests_finished", "requests that ended, by reason", labels=["reason"])
    for reason, count in counters.finished.items():
        finished.add_metric([reason], count)
    registry.register(_Fixed([*families, finished]))
    return generate_latest(registry)


class _Fixed(Collector):
    def __init__(self, families: list[CounterMetricFamily]):
        self.families = families

    def collect(self) -> list[CounterMetricFamily]:
        return self.families
