//! What the processes of a server use: processor time and memory, from the kernel.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::Pid;

/// What processes are added up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    Application,
    Writer,
    Redis,
    /// What Redis starts to rewrite its log.
    Rewriting,
    Cache,
    Postgres,
}

impl Family {
    /// Its name in a report.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Application => "application",
            Self::Writer => "writer",
            Self::Redis => "redis",
            Self::Rewriting => "redis_rewriting",
            Self::Cache => "cache",
            Self::Postgres => "postgres",
        }
    }
}

/// Where to look: processes that we know, and below them everything that they started.
#[derive(Clone, Debug)]
pub(crate) struct Roots {
    pub(crate) families: Vec<(Family, Pid)>,
    /// The port of the Redis that decides; another one is the cache.
    pub(crate) redis_port: Option<u16>,
}

/// What a family used so far, and has now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) cpu: Duration,
    pub(crate) rss_bytes: u64,
}

/// One look at all of them.
pub(crate) type Look = BTreeMap<Family, Usage>;

/// A process as the kernel shows it.
#[derive(Debug, PartialEq)]
pub(crate) struct Stat {
    pub(crate) pid: i32,
    name: String,
    pub(crate) parent: i32,
    /// User and system, in ticks: its own, and of its children that ended.
    ticks: u64,
    ticks_of_children: u64,
    pages: u64,
}

impl Roots {
    /// Looks at every process below the roots.
    pub(crate) fn look(&self) -> Result<Look> {
        let stats: HashMap<_, _> = processes()?
            .into_iter()
            .map(|stat| (stat.pid, stat))
            .collect();
        let mut look = Look::new();
        for stat in stats.values() {
            let Some(family) = self.family(stat, &stats) else {
                continue;
            };
            let per_second = u32::try_from(clock_ticks_per_second())?;
            let usage = look.entry(family).or_default();
            usage.cpu += Duration::from_secs(stat.ticks) / per_second;
            usage.rss_bytes += stat.pages * page_size() as u64;
            // Those that have come and gone.
            let gone = match family {
                Family::Redis => Family::Rewriting,
                Family::Postgres => Family::Postgres,
                _ => continue,
            };
            let usage = look.entry(gone).or_default();
            usage.cpu += Duration::from_secs(stat.ticks_of_children) / per_second;
        }
        Ok(look)
    }

    /// Which family a process belongs to: its own if it is known, else that of its parent.
    fn family(&self, stat: &Stat, stats: &HashMap<i32, Stat>) -> Option<Family> {
        let is_root = |root: &&(Family, Pid)| root.1.as_raw_nonzero().get() == stat.pid;
        if let Some((family, _)) = self.families.iter().find(is_root) {
            return Some(*family);
        }
        let above = self.family(stats.get(&stat.parent)?, stats)?;
        Some(match above {
            Family::Application if stat.name.starts_with("postgres") => Family::Postgres,
            Family::Application => {
                let command = fs::read_to_string(format!("/proc/{}/cmdline", stat.pid));
                let command = command.unwrap_or_default();
                let port = self.redis_port.map(|port| format!(":{port}"));
                match port {
                    Some(port) if command.contains(&port) => Family::Redis,
                    _ => Family::Cache,
                }
            }
            Family::Redis => Family::Rewriting,
            other => other,
        })
    }
}

/// Every process there is.
pub(crate) fn processes() -> Result<Vec<Stat>> {
    let mut stats = Vec::new();
    for entry in fs::read_dir("/proc").context("there is no /proc")? {
        let file = entry?.path().join("stat");
        // Most entries are no processes, and some processes have ended meanwhile.
        stats.extend(fs::read_to_string(file).ok().and_then(|text| stat(&text)));
    }
    Ok(stats)
}

/// Reads `pid (name) state parent …`; the name may hold anything, so it is cut out from behind.
fn stat(text: &str) -> Option<Stat> {
    let (pid, rest) = text.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let number = |n: usize| fields.get(n)?.parse::<u64>().ok();
    Some(Stat {
        pid: pid.parse().ok()?,
        name: name.to_owned(),
        parent: fields.get(1)?.parse().ok()?,
        ticks: number(11)? + number(12)?,
        ticks_of_children: number(13)? + number(14)?,
        pages: number(21)?,
    })
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn the_kernels_line_is_read_whatever_the_name() {
        let line = "42 (a ) b) S 7 42 42 0 -1 4194560 9 0 0 0 100 20 3 4 20 0 9 0 5 1000 77 18446744073709551615 1";
        let wanted = Stat {
            pid: 42,
            name: "a ) b".to_owned(),
            parent: 7,
            ticks: 120,
            ticks_of_children: 7,
            pages: 77,
        };
        assert_eq!(stat(line), Some(wanted));
        assert_eq!(stat("nonsense"), None);
    }

    #[test]
    fn a_root_is_seen_with_its_memory_and_time() {
        let roots = Roots {
            families: vec![(
                Family::Application,
                Pid::from_raw(process::id().cast_signed()).unwrap(),
            )],
            redis_port: None,
        };
        let used = |look: &Look| look[&Family::Application];
        let before = roots.look().unwrap();
        assert!(used(&before).rss_bytes > 100_000);
        while used(&roots.look().unwrap()).cpu == used(&before).cpu {}
    }
}
