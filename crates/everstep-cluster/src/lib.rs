//! Actors, supervision and the node agent; the only crate that knows ractor.
