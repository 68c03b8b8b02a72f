//! `stockade audit`: whether every invariant of every sale holds. Changes nothing.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;
use stockade::clock;
use stockade::config::Config;
use stockade::domain::durability::Said;
use stockade::domain::id::{Partition, SaleId};
use stockade::engine::{Engine, EngineOptions, Engines, RedisUrl};
use stockade::metrics::EngineMetrics;
use stockade::ops::auditor::{Auditor, RoundReport, Status};
use stockade::store::DatabaseSettings;
use stockade::store::journal::Positions;
use stockade::store::sales::{Filter, SaleFacts, Sales};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// A check fails, or nothing may be said because a partition is fenced.
const EXIT_FAIL: u8 = 2;
/// Nothing is wrong, but not everything is stored.
const EXIT_PENDING: u8 = 3;
/// The pause before looking again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Sums of a round with millions of orders take longer than a request may.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(1);
/// Sales of a page.
const PAGE: usize = 100;

/// What to audit, and how to tell.
#[derive(Debug, clap::Args)]
pub(super) struct AuditArguments {
    /// Only this sale; all by default
    #[arg(long, value_name = "ID")]
    sale: Option<Uuid>,
    /// Print one JSON document instead of tables
    #[arg(long)]
    json: bool,
    /// How long to look again while not everything is stored: 500ms, 30s, 2m
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    wait: Duration,
}

/// Everything that was found.
#[derive(Serialize)]
struct Findings {
    verdict: Status,
    /// Partitions of which nothing can be said, and why.
    fenced: BTreeMap<String, String>,
    rounds: Vec<RoundReport>,
}

/// Audits, prints, and says by its exit code: 0 pass, 2 fail or fenced, 3 pending; 1 is an error.
pub(super) fn run(arguments: &AuditArguments, config: &Config) -> anyhow::Result<ExitCode> {
    let findings = super::block_on(audit(arguments, config))?;
    let mut out = io::stdout().lock();
    if arguments.json {
        super::print_json(&mut out, &findings)?;
    } else {
        print(&mut out, &findings)?;
    }
    Ok(match findings.verdict {
        Status::Pass => ExitCode::SUCCESS,
        Status::Fail => ExitCode::from(EXIT_FAIL),
        Status::Pending => ExitCode::from(EXIT_PENDING),
    })
}

async fn audit(arguments: &AuditArguments, config: &Config) -> anyhow::Result<Findings> {
    let endpoints = super::endpoints(config)?;
    let settings = DatabaseSettings {
        statement_timeout: STATEMENT_TIMEOUT,
        ..DatabaseSettings::default()
    };
    let database = super::migrated(&endpoints, settings).await?;
    let deadline = Instant::now() + arguments.wait;
    let sales = sales(&Sales::new(database.clone()), arguments.sale).await?;

    let options = EngineOptions {
        receipt_key: 0,
        url: RedisUrl(endpoints.redis_url.clone()),
        queue_capacity: 1,
        said: Said::default(),
    };
    let mut engines = Vec::new();
    let last = sales.iter().map(|sale| sale.partition.0).max();
    for number in 0..last.map_or(0, |last| last + 1) {
        let engine = Engine::connect(&options, Partition(number), EngineMetrics::default()).await;
        engines.push(engine.context("Redis does not answer")?);
    }
    let engines = Engines::new(engines);
    let positions = Positions::new(database.clone());
    let mut fenced = BTreeMap::new();
    for engine in engines.all() {
        let partition = engine.partition();
        if sales.iter().any(|sale| sale.partition == partition) {
            let mut reason = enter(engine, &positions).await?;
            // A server that has just started is about to verify it.
            while reason.is_some() && Instant::now() < deadline {
                sleep(LOOK_AGAIN).await;
                reason = enter(engine, &positions).await?;
            }
            if let Some(reason) = reason {
                fenced.insert(partition.to_string(), reason);
            }
        }
    }

    let auditor = Auditor::new(database, engines);
    let mut rounds = Vec::new();
    for sale in &sales {
        if fenced.contains_key(&sale.partition.to_string()) {
            continue;
        }
        for round in 1..=sale.last().round {
            let mut report = auditor.round(sale, round).await?;
            while report
                .as_ref()
                .is_some_and(|report| report.verdict == Status::Pending)
                && Instant::now() < deadline
            {
                sleep(LOOK_AGAIN).await;
                report = auditor.round(sale, round).await?;
            }
            rounds.extend(report);
        }
    }
    let worst = rounds.iter().map(|report| report.verdict).max();
    let verdict = if fenced.is_empty() {
        worst.unwrap_or(Status::Pass)
    } else {
        Status::Fail
    };
    Ok(Findings {
        verdict,
        fenced,
        rounds,
    })
}

/// The sale with this id, or all.
async fn sales(sales: &Sales, id: Option<Uuid>) -> anyhow::Result<Vec<Arc<SaleFacts>>> {
    if let Some(id) = id {
        return match sales.by_id(SaleId(id)).await? {
            Some(sale) => Ok(vec![sale.facts]),
            None => bail!("there is no sale {id}"),
        };
    }
    let mut all: Vec<Arc<SaleFacts>> = Vec::new();
    loop {
        let filter = Filter {
            state: None,
            now: clock::now(),
            product: None,
            after: all.last().map(|sale| sale.number),
            limit: i64::try_from(PAGE)?,
        };
        let page = sales.list(filter).await?;
        let is_last = page.len() < PAGE;
        all.extend(page);
        if is_last {
            return Ok(all);
        }
    }
}

/// Takes the partition as its server has verified it; gives the reason if nobody has.
async fn enter(engine: &Engine, positions: &Positions) -> anyhow::Result<Option<String>> {
    let Some(position) = positions.find(engine.partition()).await? else {
        return Ok(Some("PostgreSQL has no position of it".to_owned()));
    };
    let inspection = engine.inspect().await?;
    Ok(match inspection.epoch {
        None => Some("Redis has nothing of it".to_owned()),
        Some(epoch) if epoch != position.epoch => Some(format!(
            "Redis is in epoch {}, PostgreSQL in epoch {}",
            epoch.0, position.epoch.0
        )),
        Some(epoch) if !inspection.same_incarnation => Some(format!(
            "Redis was restarted or replaced since epoch {} began",
            epoch.0
        )),
        Some(epoch) => {
            engine.adopt(epoch, &inspection);
            None
        }
    })
}

fn print(out: &mut impl Write, findings: &Findings) -> io::Result<()> {
    for (partition, reason) in &findings.fenced {
        writeln!(
            out,
            "partition {partition} is fenced, nothing is sold and nothing can be said: {reason}"
        )?;
    }
    for report in &findings.rounds {
        let RoundReport {
            sale_id,
            round,
            verdict,
            checks,
            ..
        } = report;
        writeln!(out, "sale {sale_id}, round {round}: {}", verdict.as_str())?;
        let widest = checks
            .iter()
            .map(|check| check.expected.chars().count())
            .max()
            .unwrap_or(0);
        writeln!(
            out,
            "  {:7}  {:18}  {:widest$}  actual",
            "status", "check", "expected"
        )?;
        for check in checks {
            writeln!(
                out,
                "  {:7}  {:18}  {:widest$}  {}",
                check.status.as_str(),
                check.name.as_str(),
                check.expected,
                check.actual
            )?;
        }
        writeln!(out)?;
    }
    let rounds = findings.rounds.len();
    writeln!(
        out,
        "{}: {rounds} rounds audited",
        findings.verdict.as_str()
    )
}

/// Reads `500ms`, `30s`, `2m`; a bare number is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u32 = digits
        .parse()
        .map_err(|_| "a number with ms, s or m, such as 30s".to_owned())?;
    let unit = match &text[digits.len()..] {
        "ms" => Duration::from_millis(1),
        "s" | "" => Duration::from_secs(1),
        "m" => Duration::from_mins(1),
        unit => return Err(format!("{unit} is none of ms, s and m")),
    };
    Ok(unit * number)
}

#[cfg(test)]
mod tests {
    use super::duration;
    use std::time::Duration;

    #[test]
    fn durations_are_read_with_their_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_mins(2)));
        for wrong in ["", "s", "-1s", "1.5s", "1h", "1 s", "99999999999s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
