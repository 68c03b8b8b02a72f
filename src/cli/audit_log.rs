//! `stockade audit-log`: what people did, and whether the log of it is whole.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use chrono::{DateTime, SecondsFormat, Utc};
use clap::Subcommand;
use serde::Serialize;
use stockade::clock;
use stockade::config::Config;
use stockade::domain::audit_log::Link;
use stockade::ops::audit_log::verify;
use stockade::store::DatabaseSettings;
use stockade::store::audit_log::{AuditLog, Filter, Row};
use uuid::Uuid;

/// Somebody has tampered with it.
const EXIT_BROKEN: u8 = 2;
/// Rows that wait longer than this for their place show that no writer runs.
const UNCHAINED_MAX_SECONDS: i64 = 60;

/// What to do with the audit log.
#[derive(Debug, Subcommand)]
pub(super) enum AuditLogCommand {
    /// Verify the chain: names the first row that was changed, removed, inserted or moved, and prints
    /// the end of the chain.
    ///
    /// Write that end down elsewhere and give it back as `--head`: only that shows a chain that was
    /// made anew as a whole by whoever owns the database. Exit code: 0 whole, 1 an error, 2 broken.
    Verify {
        /// A place in the chain that was printed before, as number:hash
        #[arg(long, value_parser = link)]
        head: Option<Link>,
    },
    /// List rows, the latest first.
    List(ListArguments),
}

/// Which rows.
#[derive(Debug, clap::Args)]
pub(super) struct ListArguments {
    /// Only this action, such as `sales_pause` or `products.update`
    #[arg(long)]
    action: Option<String>,
    /// Only what this user did
    #[arg(long)]
    actor: Option<Uuid>,
    /// Only what is about this id, or about something of it
    #[arg(long)]
    target: Option<String>,
    /// Only this request
    #[arg(long)]
    request_id: Option<String>,
    /// Only with this outcome: done, abandoned or the code of a problem
    #[arg(long)]
    outcome: Option<String>,
    /// Only from this instant on (RFC 3339)
    #[arg(long)]
    since: Option<DateTime<Utc>>,
    /// Only before this instant (RFC 3339)
    #[arg(long)]
    until: Option<DateTime<Utc>>,
    /// So many at most
    #[arg(long, default_value_t = 100)]
    limit: u16,
    /// Print one JSON document instead of lines
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: &AuditLogCommand, config: &Config) -> anyhow::Result<ExitCode> {
    let endpoints = super::endpoints(config)?;
    super::block_on(async {
        let database = super::migrated(&endpoints, DatabaseSettings::default()).await?;
        let log = AuditLog::new(database);
        match command {
            AuditLogCommand::Verify { head } => verified(&log, *head).await,
            AuditLogCommand::List(arguments) => list(&log, arguments).await,
        }
    })
}

async fn verified(log: &AuditLog, head: Option<Link>) -> anyhow::Result<ExitCode> {
    let verified = verify(log, head).await?;
    let mut out = io::stdout().lock();
    let (number, hash) = (verified.at.number, hex(&verified.at.hash));
    if let Some(broken) = verified.broken {
        writeln!(out, "BROKEN: {broken}")?;
        writeln!(out, "whole up to {number}:{hash}")?;
        return Ok(ExitCode::from(EXIT_BROKEN));
    }
    writeln!(out, "whole: {number} rows, head {number}:{hash}")?;
    let unchained = log.unchained().await?;
    if let Some(since) = unchained.since {
        let waits = (clock::now() - since).num_seconds() > UNCHAINED_MAX_SECONDS;
        let hint = if waits {
            ": no `serve` or `writer` has run since"
        } else {
            ""
        };
        writeln!(
            out,
            "{} rows wait for their place since {}{hint}",
            unchained.rows,
            instant(since)
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(log: &AuditLog, arguments: &ListArguments) -> anyhow::Result<ExitCode> {
    let filter = Filter {
        action: arguments.action.clone(),
        actor: arguments.actor,
        target: arguments.target.clone(),
        request_id: arguments.request_id.clone(),
        outcome: arguments.outcome.clone(),
        since: arguments.since,
        until: arguments.until,
        before: None,
        limit: arguments.limit.into(),
    };
    let rows = log.list(filter).await?;
    let mut out = io::stdout().lock();
    if arguments.json {
        super::print_json(&mut out, &rows)?;
    } else {
        for row in &rows {
            writeln!(out, "{}", line(row)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One line for people: what was said there by others is shown as JSON, so that it stays in its line.
fn line(row: &Row) -> anyhow::Result<String> {
    let mut words = vec![
        instant(row.at),
        row.action.clone(),
        json(&row.outcome)?,
        format!("#{}", row.id),
    ];
    if row.times > 1 {
        words.push(format!("{} times", row.times));
    }
    for (name, value) in [
        ("actor", row.actor.map(|actor| actor.to_string())),
        ("role", row.role.clone()),
        ("credential", row.credential.map(|id| id.to_string())),
        ("client", row.client.clone()),
        ("request", row.request_id.as_ref().map(json).transpose()?),
        (
            "target",
            row.target.as_ref().map(|target| {
                let kind = row.target_kind.as_deref().unwrap_or_default();
                format!("{kind}/{target}")
            }),
        ),
        ("before", row.before.as_ref().map(json).transpose()?),
        ("after", row.after.as_ref().map(json).transpose()?),
    ] {
        if let Some(value) = value {
            words.push(format!("{name}={value}"));
        }
    }
    Ok(words.join(" "))
}

fn json(value: &impl Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string(value)?)
}

fn instant(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Reads what [`verified`] prints.
fn link(text: &str) -> anyhow::Result<Link> {
    let (number, hash) = text.split_once(':').context("is not number:hash")?;
    let pairs = (0..hash.len()).step_by(2);
    let bytes: Option<Vec<u8>> = pairs
        .map(|at| u8::from_str_radix(hash.get(at..at + 2)?, 16).ok())
        .collect();
    let bytes = bytes.context("the hash is not hexadecimal")?;
    Ok(Link {
        number: number.parse()?,
        hash: bytes
            .try_into()
            .map_err(|_| anyhow!("the hash does not have 64 digits"))?,
    })
}
