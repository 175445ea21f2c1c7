//! Tracing, OpenTelemetry, metrics, TensorBoard and the event log.
