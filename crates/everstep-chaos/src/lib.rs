//! Chaos: scenarios that break a run on purpose, and the proof that nothing changed.
