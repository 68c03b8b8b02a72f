//! `stockade dead-letters`: what no table would take, and another try after the cause is mended.

use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;
use stockade::config::Config;
use stockade::domain::id::Partition;
use stockade::store::DatabaseSettings;
use stockade::store::audit::Snapshot;
use stockade::store::journal::Ledger;
use stockade::store::rebuild::StoredLetter;
use stockade::writer::{Redriven, redrive};

/// Some are still dead letters.
const EXIT_KEPT: u8 = 2;

/// What to do with dead letters.
#[derive(Debug, clap::Subcommand)]
pub(super) enum DeadLettersCommand {
    /// List those that are not resolved, in order of the journal.
    List(Output),
    /// Store what PostgreSQL takes now. Exit code: 0 none is left, 2 some are.
    Redrive(Output),
}

/// How to tell.
#[derive(Debug, clap::Args)]
pub(super) struct Output {
    /// Print one JSON document instead of lines
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line {
    id: i64,
    partition: u16,
    entry: String,
    round: String,
    seq_from: u64,
    seq_to: u64,
    /// Units that count as sold because of it.
    units: i64,
    order_id: Option<String>,
    reason: String,
    /// What became of it; absent when nothing was tried.
    outcome: Option<String>,
}

/// Lists or redrives.
pub(super) fn run(command: &DeadLettersCommand, config: &Config) -> anyhow::Result<ExitCode> {
    let (retry, output) = match command {
        DeadLettersCommand::List(output) => (false, output),
        DeadLettersCommand::Redrive(output) => (true, output),
    };
    let (lines, kept) = super::block_on(letters(retry, config))?;
    let mut out = io::stdout().lock();
    if output.json {
        super::print_json(&mut out, &lines)?;
    } else {
        for line in &lines {
            writeln!(
                out,
                "{}: entry {} of partition {}, round {}, seq {} to {}, {} units{}: {}",
                line.id,
                line.entry,
                line.partition,
                line.round,
                line.seq_from,
                line.seq_to,
                line.units,
                line.order_id
                    .as_ref()
                    .map_or_else(String::new, |order| format!(", order {order}")),
                line.outcome.as_ref().unwrap_or(&line.reason),
            )?;
        }
        writeln!(out, "{} dead letters", lines.len())?;
    }
    Ok(if retry && kept {
        ExitCode::from(EXIT_KEPT)
    } else {
        ExitCode::SUCCESS
    })
}

async fn letters(retry: bool, config: &Config) -> anyhow::Result<(Vec<Line>, bool)> {
    let endpoints = super::endpoints(config)?;
    let database = super::migrated(&endpoints, DatabaseSettings::default()).await?;
    let mut lines = Vec::new();
    let mut kept = false;
    for number in 0..config.partitions {
        let partition = Partition(number);
        let letters = Snapshot::take(&database).await?.letters(partition).await?;
        let outcomes = if retry {
            let mut ledger = Ledger::new(&database, partition);
            redrive(&mut ledger, &letters).await?
        } else {
            Vec::new()
        };
        kept |= outcomes
            .iter()
            .any(|(_, outcome)| *outcome != Redriven::Stored);
        for (at, letter) in letters.iter().enumerate() {
            let outcome = outcomes.get(at).map(|(_, outcome)| match outcome {
                Redriven::Stored => "stored".to_owned(),
                Redriven::Kept(reason) => format!("kept: {reason}"),
            });
            lines.push(line(partition, letter, outcome));
        }
    }
    Ok((lines, kept))
}

fn line(partition: Partition, letter: &StoredLetter, outcome: Option<String>) -> Line {
    Line {
        id: letter.id,
        partition: partition.0,
        entry: letter.entry.to_string(),
        round: letter.round.to_string(),
        seq_from: letter.seq_from,
        seq_to: letter.seq_to,
        units: letter.delta.held + letter.delta.sold,
        order_id: letter.order.map(|order| order.to_string()),
        reason: letter.reason.clone(),
        outcome,
    }
}
