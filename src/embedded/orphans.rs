//! Stops what a killed server left running on a data directory.
//!
//! Nothing is written down beforehand, so nothing can be stale: a process is ours if it is one of our
//! programs and its working directory, or an argument, lies in one of our service directories.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use super::EmbeddedError;

const PROGRAMS: [&str; 5] = [
    "redis-server",
    "valkey-server",
    "postgres",
    "initdb",
    "setpriv",
];
/// Orderly, then by force, then killed: the next start shall be ready within 30 s of a crash.
const ORDERLY: Duration = Duration::from_secs(12);
const FORCED: Duration = Duration::from_secs(4);
const KILLED: Duration = Duration::from_secs(4);
/// They are not our children, so nothing tells us when they end.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct Orphan {
    pid: Pid,
    parent: i32,
    name: String,
}

/// Stops every service process that runs in one of the directories (real paths), and waits until all are gone.
pub(super) async fn stop(directories: &[PathBuf]) -> Result<(), EmbeddedError> {
    type Choice = fn(&Orphan) -> Signal;
    let stages: [(Choice, Duration); 3] = [
        (orderly, ORDERLY),
        (forced, FORCED),
        (|_| Signal::KILL, KILLED),
    ];
    for (stage, (choose, within)) in stages.into_iter().enumerate() {
        let found = find(directories);
        for orphan in leaders(&found) {
            let signal = choose(orphan);
            let pid = orphan.pid.as_raw_nonzero();
            tracing::warn!(
                service = orphan.name,
                pid,
                ?signal,
                attempt = stage + 1,
                "stopping a service left by a killed server"
            );
            send(orphan, signal);
        }
        // Stopped processes obey only once they run again.
        for orphan in &found {
            send(orphan, Signal::CONT);
        }
        if gone(directories, within).await {
            return Ok(());
        }
    }
    match find(directories).into_iter().next() {
        None => Ok(()),
        Some(orphan) => Err(EmbeddedError::Orphan {
            name: orphan.name,
            pid: orphan.pid.as_raw_nonzero().get(),
        }),
    }
}

/// Waits until nothing runs in the directories; whether that came to pass in time.
pub(super) async fn gone(directories: &[PathBuf], within: Duration) -> bool {
    let deadline = Instant::now() + within;
    while !find(directories).is_empty() {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(LOOK_AGAIN).await;
    }
    true
}

fn orderly(orphan: &Orphan) -> Signal {
    if orphan.name == "postgres" {
        Signal::INT
    } else {
        Signal::TERM
    }
}

fn forced(orphan: &Orphan) -> Signal {
    if orphan.name == "postgres" {
        Signal::QUIT
    } else {
        Signal::KILL
    }
}

/// A signal to a process that has just ended is no error.
fn send(orphan: &Orphan, signal: Signal) {
    let _delivered = kill_process(orphan.pid, signal);
}

/// Those whose parent is not among them: PostgreSQL's children end with their postmaster.
fn leaders(found: &[Orphan]) -> impl Iterator<Item = &Orphan> {
    found.iter().filter(|orphan| {
        !found
            .iter()
            .any(|other| other.pid.as_raw_nonzero().get() == orphan.parent)
    })
}

fn find(directories: &[PathBuf]) -> Vec<Orphan> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| {
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            let process = entry.path();
            let name = fs::read_to_string(process.join("comm"))
                .ok()?
                .trim_end()
                .to_owned();
            if !PROGRAMS.contains(&name.as_str()) || !is_in(&process, directories) {
                return None;
            }
            let (state, parent) = state_and_parent(&process)?;
            // A zombie holds nothing any more and waits only for its parent.
            (state != "Z").then_some(Orphan { pid, parent, name })
        })
        .collect()
}

/// By working directory, or by arguments where the kernel does not show us another user's directory.
fn is_in(process: &Path, directories: &[PathBuf]) -> bool {
    let inside = |path: &Path| {
        directories
            .iter()
            .any(|directory| path.starts_with(directory))
    };
    let by_directory = fs::read_link(process.join("cwd")).is_ok_and(|cwd| inside(&cwd));
    by_directory
        || fs::read(process.join("cmdline")).is_ok_and(|arguments| {
            arguments
                .split(|byte| *byte == 0)
                .filter_map(|argument| std::str::from_utf8(argument).ok())
                .any(|argument| inside(Path::new(argument)))
        })
}

/// From `pid (name) state parent …`; the name may hold anything, so it is skipped from behind.
fn state_and_parent(process: &Path) -> Option<(String, i32)> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.to_owned();
    Some((state, fields.next()?.parse().ok()?))
}
