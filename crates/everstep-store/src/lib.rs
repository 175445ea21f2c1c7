//! Object store layout, manifests, checkpoints, leadership leases and the local ledger.
