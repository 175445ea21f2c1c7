//! Seeded simulator of a whole cluster and the invariants it checks.
