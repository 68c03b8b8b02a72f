//! `stockade rebuild`: goes on without what is lost, when no node may decide that by itself.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use stockade::clock;
use stockade::config::Config;
use stockade::domain::id::{Epoch, Partition};
use stockade::domain::order::Acceptance;
use stockade::engine::{Engine, EngineOptions, Engines, RedisUrl};
use stockade::metrics::{EngineMetrics, RecoveryMetrics};
use stockade::ops::assess::{Assessment, Loss, Verdict};
use stockade::ops::recovery::{Recovery, StaysFenced, Verified};
use stockade::store::DatabaseSettings;
use stockade::store::epochs::Epochs;
use stockade::store::floors::Floors;
use stockade::store::incidents::Incidents;
use stockade::store::journal::Positions;
use stockade::store::rounds::Rounds;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// Something would be lost, and nobody has said that it may.
const EXIT_LOSS: u8 = 2;
/// The time between two looks while nodes have not said how far they have seen.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// How long to wait for them: longer than one that says nothing counts as alive.
const PATIENCE: Duration = Duration::from_secs(15);
/// Rebuilding a partition reads everything that it has sold.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(5);
/// Acceptances that are listed one by one.
const LISTED_MAX: i64 = 100_000;
/// Of those, the lines that are printed without `--json`.
const PRINTED_MAX: usize = 20;

/// What to rebuild, and whether to lose something.
#[derive(Debug, clap::Args)]
pub(super) struct RebuildArguments {
    /// Only this partition; all by default
    #[arg(long, value_name = "NUMBER")]
    partition: Option<u16>,
    /// Say what would happen, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Go on without acknowledged orders that neither PostgreSQL nor the journal has
    #[arg(long, conflicts_with = "dry_run")]
    accept_loss: bool,
    /// Print one JSON document instead of lines
    #[arg(long)]
    json: bool,
}

/// What there is of a partition, and what was or would be done.
#[derive(Serialize)]
struct Report {
    partition: u16,
    /// `whole`, `rebuildable`, `lossy`, `waiting` or `stopped`.
    finding: &'static str,
    /// What is wrong, in words.
    reason: Option<String>,
    postgresql: Stored,
    redis: Live,
    /// The last entry that PostgreSQL and the journal have together.
    recovered_to: u64,
    /// The last entry that any node is known to have seen.
    seen_to: u64,
    nodes: Vec<Node>,
    /// Acknowledged orders that are in danger, as far as a living node has said.
    in_danger: Vec<InDanger>,
    /// Nodes that are gone without a last word: what only they answered is in no list.
    silent_nodes: usize,
    /// What was done; absent in a dry run.
    done: Option<String>,
}

#[derive(Serialize)]
struct Stored {
    epoch: u32,
    installed_epoch: u32,
    position: String,
}

#[derive(Serialize)]
struct Live {
    epoch: Option<u32>,
    entries_counted: u64,
    journal_length: Option<u64>,
    journal_first: Option<String>,
    journal_last: Option<String>,
    same_server: bool,
}

#[derive(Serialize)]
struct Node {
    id: Uuid,
    seen: String,
    last_word: bool,
    seconds_ago: u64,
}

#[derive(Serialize)]
struct InDanger {
    order_id: Uuid,
    sale: u32,
    round: u32,
    buyer_id: Uuid,
    quantity: u64,
    seq: u64,
    entry: String,
    accepted_at_ms: i64,
}

impl From<&Acceptance> for InDanger {
    fn from(lost: &Acceptance) -> Self {
        Self {
            order_id: lost.order.0,
            sale: lost.round.sale.0,
            round: lost.round.round,
            buyer_id: lost.buyer.0,
            quantity: lost.quantity,
            seq: lost.seq,
            entry: lost.at.to_string(),
            accepted_at_ms: lost.accepted_at_ms,
        }
    }
}

/// Rebuilds, prints, and says by its exit code: 0 done or nothing to do, 2 something would be lost;
/// 1 is an error.
pub(super) fn run(arguments: &RebuildArguments, config: &Config) -> anyhow::Result<ExitCode> {
    let reports = super::block_on(rebuild(arguments, config))?;
    let mut out = io::stdout().lock();
    if arguments.json {
        super::print_json(&mut out, &reports)?;
    } else {
        for report in &reports {
            print(&mut out, report)?;
        }
    }
    let lossy = reports
        .iter()
        .any(|report| report.finding == "lossy" && report.done.is_none());
    Ok(if lossy {
        ExitCode::from(EXIT_LOSS)
    } else {
        ExitCode::SUCCESS
    })
}

async fn rebuild(arguments: &RebuildArguments, config: &Config) -> anyhow::Result<Vec<Report>> {
    let endpoints = super::endpoints(config)?;
    let settings = DatabaseSettings {
        statement_timeout: STATEMENT_TIMEOUT,
        ..DatabaseSettings::default()
    };
    let database = super::migrated(&endpoints, settings).await?;
    let numbers = match arguments.partition {
        Some(number) => vec![number],
        None => (0..config.partitions).collect(),
    };
    let options = EngineOptions {
        receipt_key: 0,
        url: RedisUrl(endpoints.redis_url.clone()),
        queue_capacity: 1,
        said: config.said(),
    };
    let recovery = Recovery {
        engines: Engines::new(Vec::new()),
        positions: Positions::new(database.clone()),
        rounds: Rounds::new(database.clone()),
        floors: Floors::new(database.clone()),
        epochs: Epochs::new(database.clone()),
        incidents: Incidents::new(database.clone()),
        database,
        node: clock::new_id(),
        sells: false,
        metrics: RecoveryMetrics::default(),
    };
    let mut reports = Vec::new();
    for number in numbers {
        let partition = Partition(number);
        if recovery.positions.find(partition).await?.is_none() {
            ensure!(
                arguments.partition.is_none(),
                "there is no partition {number}"
            );
            continue;
        }
        let engine = Engine::connect(&options, partition, EngineMetrics::default()).await;
        let engine = engine.context("Redis does not answer")?;
        reports.push(one(arguments, config, &recovery, &engine).await?);
    }
    Ok(reports)
}

/// Looks at one partition, and rebuilds it if that is wanted.
async fn one(
    arguments: &RebuildArguments,
    config: &Config,
    recovery: &Recovery,
    engine: &Engine,
) -> anyhow::Result<Report> {
    let partition = engine.partition();
    let lock = if arguments.dry_run {
        None
    } else {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match recovery.lock(partition).await? {
                Some(lock) => break Some(lock),
                None if Instant::now() < deadline => sleep(LOOK_AGAIN).await,
                None => bail!("partition {partition}: somebody else is recovering it"),
            }
        }
    };
    let deadline = Instant::now() + PATIENCE;
    let (assessment, verdict) = loop {
        let assessment = recovery.assess(engine).await?;
        match assessment.verdict() {
            Verdict::Wait(_) if Instant::now() < deadline => sleep(LOOK_AGAIN).await,
            verdict => break (assessment, verdict),
        }
    };
    let mut report = describe(recovery, &assessment, &verdict).await?;
    if arguments.dry_run {
        return Ok(report);
    }
    let grace = Duration::from_secs(config.grace_seconds.into());
    let done = match verdict {
        // A node does it as well; here it saves the wait.
        Verdict::Begin { .. } | Verdict::Rebuild => {
            drop(lock);
            Some(recovery.verify(engine).await)
        }
        Verdict::Lost(loss) if arguments.accept_loss => Some(
            recovery
                .rebuild_with_loss(engine, &assessment, loss, grace)
                .await,
        ),
        Verdict::Adopt | Verdict::Lost(_) => None,
        Verdict::Wait(reason) | Verdict::Stop(reason) => {
            bail!("partition {partition} cannot be rebuilt: {reason}")
        }
    };
    report.done = match done {
        None => None,
        Some(Ok(Verified::Adopted)) => Some("somebody else had done it".to_owned()),
        Some(Ok(Verified::Begun(entry))) => Some(format!("epoch {} has begun", entry.epoch.0)),
        Some(Ok(Verified::Rebuilt(entry, sales))) => Some(format!(
            "{sales} sales made anew; epoch {} has begun",
            entry.epoch.0
        )),
        Some(Err(StaysFenced::Passing(reason) | StaysFenced::Lost(reason))) => {
            bail!("partition {partition} is not rebuilt: {reason}")
        }
    };
    Ok(report)
}

async fn describe(
    recovery: &Recovery,
    assessment: &Assessment,
    verdict: &Verdict,
) -> anyhow::Result<Report> {
    let Assessment {
        partition,
        position,
        redis,
        survives,
        ..
    } = assessment;
    let damage = assessment.damage.clone();
    let (finding, reason, silent_nodes) = match verdict {
        Verdict::Adopt | Verdict::Begin { doubt: 0 } => ("whole", None, 0),
        Verdict::Begin { doubt } => ("whole", None, *doubt),
        Verdict::Rebuild => ("rebuildable", damage, 0),
        Verdict::Lost(Loss { reason, silent, .. }) => ("lossy", Some(reason.clone()), *silent),
        Verdict::Wait(reason) => ("waiting", Some(reason.clone()), 0),
        Verdict::Stop(reason) => ("stopped", Some(reason.clone()), 0),
    };
    let in_danger = if finding == "lossy" {
        let end = survives.end;
        recovery
            .incidents
            .in_danger(*partition, end, LISTED_MAX)
            .await?
    } else {
        Vec::new()
    };
    let nodes = recovery.floors.of(*partition).await?;
    Ok(Report {
        partition: partition.0,
        finding,
        reason,
        postgresql: Stored {
            epoch: position.epoch.0,
            installed_epoch: position.installed.0,
            position: position.stored.to_string(),
        },
        redis: Live {
            epoch: redis.epoch.map(|Epoch(epoch)| epoch),
            entries_counted: redis.pseq,
            journal_length: redis.journal_length,
            journal_first: redis.journal_first.map(|id| id.to_string()),
            journal_last: redis.journal_last.map(|id| id.to_string()),
            same_server: redis.same_incarnation,
        },
        recovered_to: survives.end,
        seen_to: assessment.seen_to(),
        nodes: nodes
            .iter()
            .map(|node| Node {
                id: node.node,
                seen: node.floor.to_string(),
                last_word: node.last_word,
                seconds_ago: node.age.as_secs(),
            })
            .collect(),
        in_danger: in_danger.iter().map(InDanger::from).collect(),
        silent_nodes,
        done: None,
    })
}

fn print(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let Report {
        partition,
        finding,
        postgresql,
        redis,
        recovered_to,
        seen_to,
        in_danger,
        ..
    } = report;
    writeln!(out, "partition {partition}: {finding}")?;
    if let Some(reason) = &report.reason {
        writeln!(out, "  {reason}")?;
    }
    writeln!(
        out,
        "  PostgreSQL: stored up to entry {}, epoch {}, last installed {}",
        postgresql.position, postgresql.epoch, postgresql.installed_epoch
    )?;
    let none = || "none".to_owned();
    writeln!(
        out,
        "  Redis: epoch {}, {} entries counted, journal from {} to {}",
        redis.epoch.map_or_else(none, |epoch| epoch.to_string()),
        redis.entries_counted,
        redis.journal_first.clone().unwrap_or_else(none),
        redis.journal_last.clone().unwrap_or_else(none),
    )?;
    for node in &report.nodes {
        writeln!(
            out,
            "  node {}: saw entry {}, {} s ago{}",
            node.id,
            node.seen,
            node.seconds_ago,
            if node.last_word {
                ", its last word"
            } else {
                ", not its last word"
            }
        )?;
    }
    writeln!(
        out,
        "  recovered up to entry {recovered_to}; entry {seen_to} was seen"
    )?;
    if *finding == "lossy" {
        writeln!(
            out,
            "  lost: entries {} to {}, {} acknowledged orders known",
            recovered_to + 1,
            seen_to.max(recovered_to),
            in_danger.len()
        )?;
        for lost in in_danger.iter().take(PRINTED_MAX) {
            writeln!(
                out,
                "    order {} of buyer {}: {} of sale {}, round {}, entry {}",
                lost.order_id, lost.buyer_id, lost.quantity, lost.sale, lost.round, lost.entry
            )?;
        }
        if in_danger.len() > PRINTED_MAX {
            let rest = in_danger.len() - PRINTED_MAX;
            writeln!(out, "    and {rest} more; `--json` lists them")?;
        }
        if report.silent_nodes > 0 {
            writeln!(
                out,
                "  {} nodes are gone without a last word: what only they answered is in no list",
                report.silent_nodes
            )?;
        }
    }
    match &report.done {
        Some(done) => writeln!(out, "  done: {done}"),
        None if *finding == "lossy" => writeln!(
            out,
            "  nothing was changed; `stockade rebuild --accept-loss` goes on without them"
        ),
        None => writeln!(out, "  nothing was changed"),
    }
}
