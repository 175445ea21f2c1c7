//! What the system says of a process: `/proc/<pid>`.

use std::fs;

/// Part of `/proc/<pid>/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    /// `R` runs, `S` and `D` wait, `T` is stopped by a signal, `t` by a debugger, `Z` and `X` are dead.
    pub(crate) state: char,
    /// When it started, in clock ticks since boot: with the pid, the identity of a process.
    pub(crate) started_ticks: u64,
    /// CPU time of all its threads, in clock ticks.
    pub(crate) cpu_ticks: u64,
}

impl Stat {
    /// Not dead.
    pub(crate) fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// What the system says of `pid`; none if there is no such process.
pub(crate) fn stat(pid: u32) -> Option<Stat> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Number of the calling thread.
pub(crate) fn own_thread() -> u32 {
    nix::unistd::gettid().as_raw() as u32
}

/// CPU time of those threads of this process whose number and name are chosen, in clock ticks.
pub(crate) fn own_threads_cpu_ticks(choose: impl Fn(u32, &str) -> bool) -> u64 {
    let threads = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let ticks = threads.filter_map(|thread| {
        let number = thread.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(thread.path().join("comm")).ok()?;
        if !choose(number, name.trim_end()) {
            return None;
        }
        let stat = fs::read_to_string(thread.path().join("stat")).ok()?;
        Some(parse(&stat)?.cpu_ticks)
    });
    ticks.sum()
}

/// The second field is the program's name, in brackets, and may hold anything: what counts begins after the last bracket.
fn parse(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        started_ticks: number(19)?,
        cpu_ticks: number(11)? + number(12)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_brackets_and_blanks() {
        let text = "71 (a ) T b) S 1 71 71 0 -1 4194560 1 0 0 0 15 4 0 0 20 0 1 0 9001 1 1";
        let stat = parse(text).unwrap();
        assert_eq!(
            stat,
            Stat {
                state: 'S',
                started_ticks: 9001,
                cpu_ticks: 19
            }
        );
        assert!(parse("71 (short) S 1").is_none());
    }

    #[test]
    fn this_process_is_alive_and_has_computed() {
        let own = stat(std::process::id()).unwrap();
        assert!(own.is_alive());
        let mut sum = 0u64;
        while own_threads_cpu_ticks(|thread, _| thread == own_thread()) == 0 {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(stat(u32::MAX).is_none());
    }
}
