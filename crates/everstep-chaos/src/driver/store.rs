//! Faults of the object store.

use std::fs;
use std::path::{Path, PathBuf};

use super::Driver;
use super::ongoing::{Ongoing, Todo};
use crate::proxy::http::{HttpFault, HttpRule};
use crate::scenario::{Damage, Fault};

/// What a store answers that is away.
const AWAY_STATUS: u16 = 503;

impl Driver<'_> {
    /// A store that is a folder is renamed, and a plain file put in its place, so that no request can succeed by making a new one; one
    /// behind a proxy answers nothing but errors.
    pub(super) fn take_store_away(
        &mut self,
        fault: &Fault,
        seconds: f64,
        now: f64,
    ) -> Result<(), String> {
        let Some(store) = self.store.folder() else {
            let status = AWAY_STATUS;
            return self.spoil_requests(fault, HttpFault::Refuse { status }, 1.0, seconds, now);
        };
        if !store.is_dir() {
            return Err("the store is not there".to_owned());
        }
        fs::rename(store, away(store))
            .and_then(|()| fs::write(store, "the store is away"))
            .map_err(|error| format!("the store cannot be taken away: {error}"))?;
        let at = now + seconds;
        self.note(fault, now, Vec::new(), Todo::RestoreStore { at });
        if let Some(last) = self.faults.last_mut() {
            last.happened = true;
        }
        Ok(())
    }

    /// Puts the folder back.
    pub(super) fn put_store_back(&mut self, record: usize, now: f64) {
        let record = &mut self.faults[record];
        if let Some(store) = self.store.folder() {
            let restored = fs::remove_file(store).and_then(|()| fs::rename(away(store), store));
            if let Err(error) = restored {
                record.note = Some(format!("the store could not be put back: {error}"));
            }
        }
        record.until = Some(now);
    }

    /// A share of the requests to the store suffers for so long.
    pub(super) fn spoil_requests(
        &mut self,
        fault: &Fault,
        http_fault: HttpFault,
        share: f64,
        seconds: f64,
        now: f64,
    ) -> Result<(), String> {
        if self.ongoing.iter().any(Ongoing::holds_store) {
            // The proxy would give up the one for the other.
            return Err("another fault of the store is not over".to_owned());
        }
        let proxy = self.store.proxy().ok_or("the store is behind no proxy")?;
        let before = proxy.num_faults();
        proxy.set(&[HttpRule {
            fault: http_fault,
            share,
        }]);
        let at = now + seconds;
        self.note(fault, now, Vec::new(), Todo::MendRequests { at, before });
        Ok(())
    }

    /// Lets requests pass again and notes how many suffered.
    pub(super) fn mend_requests(&mut self, record: usize, before: u64, now: f64) {
        let Some(proxy) = self.store.proxy() else {
            return;
        };
        proxy.set(&[]);
        let suffered = proxy.num_faults() - before;
        let record = &mut self.faults[record];
        record.until = Some(now);
        record.requests = Some(suffered);
        record.happened = suffered > 0;
        if suffered == 0 {
            record.note = Some("no request to the store suffered".to_owned());
        }
    }

    /// Damages an object of the newest committed checkpoint.
    pub(super) fn damage(&mut self, fault: &Fault, how: Damage, now: f64) -> Result<(), String> {
        let object = self.store.damage_newest(how, &mut self.random)?;
        self.note(fault, now, Vec::new(), Todo::Nothing);
        if let Some(last) = self.faults.last_mut() {
            last.happened = true;
            last.object = Some(object);
        }
        Ok(())
    }
}

/// Where the store lies while it is away.
fn away(store: &Path) -> PathBuf {
    store.with_extension("away")
}
