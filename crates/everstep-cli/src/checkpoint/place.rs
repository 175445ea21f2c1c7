//! How the command line names a run's checkpoints.

use std::path::Path;

use everstep_cluster::{RunContext, RunDir};
use everstep_store::RunStore;
use url::Url;

use crate::args::checkpoint::PlaceArgs;
use crate::user;

/// Opens what `--run-dir` or the argument names.
pub(super) fn open(place: &PlaceArgs) -> anyhow::Result<RunStore> {
    match (&place.run_dir, &place.run) {
        (Some(run_dir), _) => open_run_dir(run_dir),
        (None, Some(run)) => open_source(run),
        (None, None) => Err(user("name a run: a run directory or a URL")),
    }
}

/// Opens a place to read from, which must exist.
pub(super) fn open_source(place: &str) -> anyhow::Result<RunStore> {
    // Opening a `file://` store would make the folder.
    let folder = Url::parse(place)
        .ok()
        .filter(|url| url.scheme() == "file")
        .and_then(|url| url.to_file_path().ok());
    if folder.is_some_and(|folder| !folder.is_dir()) {
        return Err(user(format!("{place}: there is no run here")));
    }
    open_any(place)
}

/// Opens a run directory or a URL.
pub(super) fn open_any(place: &str) -> anyhow::Result<RunStore> {
    if !place.contains("://") {
        return open_run_dir(Path::new(place));
    }
    let (store, run) = split(place).ok_or_else(|| {
        user(format!(
            "{place}: end the URL with the run's name, as in s3://bucket/prefix/run or file:///folder/run"
        ))
    })?;
    RunStore::open(store, run).map_err(user)
}

fn open_run_dir(run_dir: &Path) -> anyhow::Result<RunStore> {
    let run = RunContext::open(&RunDir::new(run_dir)).map_err(user)?;
    run.open_store().map_err(user)
}

/// Splits a URL into the store's and the run's name.
fn split(url: &str) -> Option<(&str, &str)> {
    let (store, run) = url.trim_end_matches('/').rsplit_once('/')?;
    let after_scheme = store.split_once("://")?.1;
    // `file:///run` has nothing left, and so has `s3://bucket`.
    (!run.is_empty() && !after_scheme.is_empty()).then_some((store, run))
}

/// Splits `RUN@STEP` or `STEP`.
pub(super) fn split_step(text: &str) -> anyhow::Result<(Option<&str>, u64)> {
    let (place, step) = match text.rsplit_once('@') {
        Some((place, step)) => (Some(place), step),
        None => (None, text),
    };
    let step = step.parse().map_err(|_| {
        user(format!(
            "`{text}`: allowed are STEP and RUN@STEP, where RUN is a run directory or a URL"
        ))
    })?;
    Ok((place, step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_end_with_the_runs_name() {
        assert_eq!(split("s3://b/p/run"), Some(("s3://b/p", "run")));
        assert_eq!(split("s3://b/run/"), Some(("s3://b", "run")));
        assert_eq!(split("s3://b"), None);
        assert_eq!(split("file:///a/run"), Some(("file:///a", "run")));
        assert_eq!(split("file:///run"), None);
    }

    #[test]
    fn steps_may_name_their_run() {
        assert_eq!(split_step("7").ok(), Some((None, 7)));
        assert_eq!(split_step("runs/a@7").ok(), Some((Some("runs/a"), 7)));
        let error = split_step("runs/a").map_err(|error| error.to_string());
        assert!(error.is_err_and(|error| error.contains("RUN@STEP")));
    }
}
