//! The run file and what a slot computes.
