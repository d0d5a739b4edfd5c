"""Programs that need both the exporter and the runtime: verification, benchmarks, the one-graph."""
