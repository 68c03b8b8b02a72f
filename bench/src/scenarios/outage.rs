//! An outage of the server's PostgreSQL in the middle of a drop: every process of it stands still
//! for a while, as a machine does that hangs. Nothing refuses a connection, nothing answers.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use uuid::Uuid;

use crate::load::sender::Record;
use crate::operator::Operator;
use crate::report::Percentiles;
use crate::target::Backstage;
use crate::usage::processes;
use crate::witness::Watch;

/// Between two looks at what PostgreSQL has.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How long PostgreSQL may take to catch up.
const DRAINED_MAX: Duration = Duration::from_mins(5);

/// When PostgreSQL stood still, and when it had caught up. All instants count from the opening.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outage {
    from: Duration,
    to: Duration,
    sold_at_end: u64,
    drained: Duration,
}

/// What an outage did to those who bought.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Effect {
    /// From the planned instant to the final answer, by when the purchase was planned.
    pub(crate) before_ms: Percentiles,
    pub(crate) during_ms: Percentiles,
    /// While PostgreSQL caught up.
    pub(crate) draining_ms: Percentiles,
    pub(crate) after_ms: Percentiles,
    pub(crate) outage_ms: f64,
    /// Orders accepted and not stored when PostgreSQL was back.
    pub(crate) backlog: u64,
    /// From then until all of them were stored.
    pub(crate) drained_ms: f64,
    /// p99 during the outage, as a multiple of p99 before.
    pub(crate) p99_ratio: f64,
}

impl Effect {
    /// Sorts the purchases by when they were planned.
    pub(crate) fn of(records: &[Record], outage: &Outage) -> Result<Self> {
        let between = |from: Duration, to: Duration| {
            let planned = records
                .iter()
                .filter(move |record| (from..to).contains(&record.due));
            Percentiles::of(planned.map(|record| record.finished.saturating_sub(record.due)))
        };
        let before_ms = between(Duration::ZERO, outage.from)?;
        let during_ms = between(outage.from, outage.to)?;
        Ok(Self {
            p99_ratio: during_ms.p99 / before_ms.p99.max(1e-3),
            draining_ms: between(outage.to, outage.drained)?,
            after_ms: between(outage.drained, Duration::MAX)?,
            before_ms,
            during_ms,
            outage_ms: outage.to.saturating_sub(outage.from).as_secs_f64() * 1e3,
            backlog: outage.sold_at_end,
            drained_ms: outage.drained.saturating_sub(outage.to).as_secs_f64() * 1e3,
        })
    }
}

/// Stops PostgreSQL at an instant, for so long, and waits until it has caught up.
pub(crate) async fn run(
    backstage: &Backstage,
    operator: Operator,
    sale: Uuid,
    opening: Instant,
    after: Duration,
    lasts: Duration,
) -> Result<Outage> {
    sleep_until(opening + after).await;
    let stored_before = stored(backstage, sale).await?;
    let standing = Standing::still(postmaster(backstage).await?, lasts)?;
    let from = opening.elapsed();
    sleep(lasts).await;
    let sold = operator.sale(sale).await?.sold;
    drop(standing);
    let to = opening.elapsed();
    let draining = async {
        loop {
            match stored(backstage, sale).await {
                Ok(stored) if stored >= sold => return,
                _ => sleep(LOOK_AGAIN).await,
            }
        }
    };
    timeout(DRAINED_MAX, draining)
        .await
        .context("PostgreSQL did not catch up")?;
    Ok(Outage {
        from,
        to,
        sold_at_end: sold.saturating_sub(stored_before),
        drained: opening.elapsed(),
    })
}

async fn connect(backstage: &Backstage) -> Result<PgConnection> {
    let databases = backstage.databases();
    let database = databases.first().context("no database is known")?;
    Ok(PgConnection::connect(database).await?)
}

/// The first process of the server's PostgreSQL: the parent of the one that answers us, if that is
/// what its own file says, too. Otherwise it may be another machine's.
async fn postmaster(backstage: &Backstage) -> Result<Pid> {
    let mut connection = connect(backstage).await?;
    let (backend, dir): (i32, String) =
        sqlx::query_as("SELECT pg_backend_pid(), current_setting('data_directory')")
            .fetch_one(&mut connection)
            .await?;
    let file = format!("{dir}/postmaster.pid");
    let text = fs::read_to_string(&file)
        .with_context(|| format!("{file} cannot be read: PostgreSQL must be this user's own"))?;
    let said = text.lines().next().and_then(|line| line.parse().ok());
    let parent = processes()?
        .into_iter()
        .find(|process| process.pid == backend)
        .map(|process| process.parent);
    connection.close().await?;
    match parent.and_then(Pid::from_raw) {
        Some(postmaster) if parent == said => Ok(postmaster),
        _ => bail!("the server's PostgreSQL does not run on this machine"),
    }
}

/// Units that PostgreSQL has as sold.
async fn stored(backstage: &Backstage, sale: Uuid) -> Result<u64> {
    let watch = Watch::of(backstage, &[sale]).await;
    let sold = watch.context("no database has the sale")?.sold().await?;
    sold.context("the sale is gone")
}

/// PostgreSQL, standing still. It goes on when this is dropped, and by itself if this process dies.
struct Standing(Vec<Pid>);

impl Standing {
    fn still(postmaster: Pid, lasts: Duration) -> Result<Self> {
        // The postmaster first: it starts no more of them then.
        kill_process(postmaster, Signal::STOP).context("PostgreSQL cannot be stopped")?;
        let mut standing = Self(vec![postmaster]);
        for child in children(postmaster)? {
            // One that has ended meanwhile is nothing to stop.
            if kill_process(child, Signal::STOP).is_ok() {
                standing.0.push(child);
            }
        }
        standing.watch_over(lasts)?;
        Ok(standing)
    }

    /// Leaves somebody behind who lets it go on, whatever becomes of this process.
    fn watch_over(&self, lasts: Duration) -> Result<()> {
        let pids: Vec<_> = self
            .0
            .iter()
            .map(|pid| pid.as_raw_nonzero().to_string())
            .collect();
        let seconds = lasts.as_secs() + 5;
        Command::new("sh")
            .arg("-c")
            .arg(format!("sleep {seconds}; kill -CONT {}", pids.join(" ")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("nobody can watch over the outage")?;
        Ok(())
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        for pid in &self.0 {
            // It may have been ended from outside.
            let _ = kill_process(*pid, Signal::CONT);
        }
    }
}

/// The processes that a process has started.
fn children(of: Pid) -> Result<Vec<Pid>> {
    let children = processes()?
        .into_iter()
        .filter(|process| process.parent == of.as_raw_nonzero().get());
    Ok(children
        .filter_map(|child| Pid::from_raw(child.pid))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::load::outcome::Outcome;

    #[test]
    fn purchases_are_sorted_by_when_they_were_planned() {
        let second = Duration::from_secs;
        let record = |due: u64, took: u64| Record {
            purchase: 0,
            due: second(due),
            first_sent: None,
            last_sent: second(due),
            finished: second(due) + Duration::from_millis(took),
            retries: 0,
            outcome: Outcome::Failed {
                reason: String::new(),
            },
        };
        let records = [record(1, 10), record(5, 20), record(9, 30), record(12, 40)];
        let outage = Outage {
            from: second(2),
            to: second(8),
            sold_at_end: 7,
            drained: second(10),
        };
        let effect = Effect::of(&records, &outage).unwrap();
        for (part, p50) in [
            (&effect.before_ms, 10.0),
            (&effect.during_ms, 20.0),
            (&effect.draining_ms, 30.0),
            (&effect.after_ms, 40.0),
        ] {
            assert_eq!(part.count, 1);
            assert!((part.p50 / p50 - 1.0).abs() < 0.01);
        }
        assert!((effect.p99_ratio - 2.0).abs() < 0.01);
    }

    #[test]
    fn who_stands_still_goes_on() {
        // A parent with a child.
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 60 & echo; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        shell.stdout.take().unwrap().read_exact(&mut byte).unwrap();
        let state = |pid: Pid| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap();
            stat.rsplit(')').next().unwrap().trim().chars().next()
        };
        let standing = Standing::still(Pid::from_child(&shell), Duration::ZERO).unwrap();
        let all = standing.0.clone();
        assert_eq!(all.len(), 2);
        while all.iter().any(|pid| state(*pid) != Some('T')) {}
        drop(standing);
        while all.iter().any(|pid| state(*pid) == Some('T')) {}
        for pid in all.into_iter().rev() {
            kill_process(pid, Signal::KILL).unwrap();
        }
        shell.wait().unwrap();
    }
}
